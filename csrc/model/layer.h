/* One decoder layer: its weights while it is loaded, the points where quantizers and calibrators sit, and its forward.
 *
 * A point is a tensor on its way through the layer: the input or output of a linear, or q, k, v of attention (after
 * rope). Points of linears that read the same tensor have the same site. */
#ifndef MQ_LAYER_H
#define MQ_LAYER_H

#include <stdatomic.h>

#include "calib/calib.h"
#include "model/arch.h"
#include "model/attention.h"
#include "model/cache.h"
#include "model/observer.h"
#include "model/ops.h"
#include "quant/quantizer.h"

/* A calibrator at a point. While a run is on, the first of several at one site that would compute the same sees the
 * data for all: it has a watch, the others it as their leader. */
typedef struct mq_watcher {
    mq_calib *calib;                /* not owned; NULL = none */
    const struct mq_watcher *leader;
    mq_calib *watch;
} mq_watcher;

enum { MQ_POINT_WATCHERS = 4 };

typedef struct mq_point {
    const mq_quantizer *quantizer;  /* not owned; NULL = none */
    mq_watcher watchers[MQ_POINT_WATCHERS];
    int watch_quantized;            /* of a linear's input: watchers see what the quantizer made of it */
    int site;                       /* number of the tensor within its layer */
} mq_point;

typedef struct mq_linear {
    mq_linear_weight weight;
    mq_linear_weight down, up;      /* (rank, I), (O, rank): a branch of low rank beside it, of the input before it is
                                     * rounded (SVDQuant, Li et al. 2024); data NULL = none */
    int64_t rows, cols;             /* (O, I) */
    mq_point input, output;
    mq_observer *observer;          /* of its output's gradient; not owned; NULL = none */
    const char *name;               /* of its module */
} mq_linear;

/* The linears of an MLP by role; joined is gate and up in one, if that has columns. */
typedef struct mq_mlp_roles {
    mq_role gate, up, down, joined;
} mq_mlp_roles;
extern const mq_mlp_roles MQ_MLP_ROLES;     /* of an MLP, or of an expert */
extern const mq_mlp_roles MQ_SHARED_ROLES;  /* of the expert that all tokens have */

typedef struct mq_layer {
    mq_linear linears[MQ_ROLE_COUNT];   /* by role; cols 0 = the layer has none. Gate, up and down of a layer with
                                         * experts are those of the expert at work; gate's points serve up too */
    float *norms[MQ_ROLE_COUNT];        /* by role, NULL while not loaded or not there; vectors too */
    int64_t widths[MQ_ROLE_COUNT];      /* of norms */
    mq_point q, k, v;                   /* attention.q_bmm_quantizer and so on */
    const char *attention_name;
    int64_t experts;                    /* 0 = the layer has an MLP */
    mq_observer *experts_observer;      /* of what the experts add up to; not owned; NULL = none */
    int64_t window;                     /* tokens a query sees, 0 = all before it */
    int64_t chunk;                      /* it sees those of its own chunk of so many; 0 = all */
    int rope;                           /* MQ_LAYER_* */
    mq_layer_kind kind;
    int loaded;
    _Atomic int busy;                   /* a run is inside, or weights are being exchanged */
} mq_layer;

/* Tokens that go through a layer together: whole sequences. */
typedef struct mq_sequence {
    int64_t first, tokens;              /* rows of the run */
    int64_t batch, index;               /* index: row of its batch */
    int64_t slot;                       /* of the cache, if there is one */
} mq_sequence;

typedef struct mq_unit {
    int64_t first_sequence, sequences;
    int64_t first, rows;
} mq_unit;

/* Memory of one worker, taken once per run; sizes in rows of the largest unit. */
typedef struct mq_scratch {
    char *memory;
    size_t nbytes;
    void *normed, *q, *k, *v, *mixed, *quantized, *temporary, *attention;   /* attention half */
    void *joined, *latent, *expanded;   /* of linears fused into one; of those between which something is narrow */
    void *mlp_normed, *gate, *up, *mlp_quantized, *mlp_temporary;           /* MLP half: the same memory */
    void *mlp_joined;
    float *factors;                 /* of rows */
    void *prepared, *low, *mlp_prepared, *mlp_low;                          /* for branches of low rank */
    void *router;                   /* logits of the experts */
    uint8_t *count_mask;            /* of rows gathered for an expert */
    int64_t mlp_rows;               /* that the MLP half has room for */
} mq_scratch;

/* What is the same for all units of a run. */
typedef struct mq_layer_context {
    const mq_config *config;
    mq_dtype dtype;
    const mq_ropes *ropes;
    const mq_sequence *sequences;
    int64_t sequence_count;
    const uint8_t *key_mask;            /* by row of the run: 0 = padding, hidden from attention; NULL = none */
    const uint8_t *count_mask;          /* by row of the run: 0 = counts in no statistic; NULL = all count */
    const mq_routes *routes;            /* of all rows of the run: where a layer with experts writes its choice */
    void *sums;                         /* (rows of the run, C): where it puts what the shared expert makes */
    int round_routes;                   /* the shares are rounded to dtype */
    int64_t rank;                       /* of the widest branch of low rank, 0 = there is none */
    int fused;                          /* some linears are two or three in one */
    int shared_inputs;                  /* an expert's input is multiplied by its share, not its output */
    mq_cache *cache;                    /* sequences go on from what it holds; NULL = they are whole */
    int64_t cache_layer;                /* the layer that this is about */
} mq_layer_context;

/* Bytes of one worker's scratch for units of up to `rows` rows and sequences of up to `tokens`; mq_scratch_init cuts
 * scratch->memory (of that size) into its buffers. */
size_t mq_scratch_init(mq_scratch *scratch, const mq_layer_context *context, int64_t rows, int64_t tokens);

/* hidden (rows of the unit, C), in place. Of a layer with experts this is the attention half, and the choice of
 * experts for every row. */
int mq_layer_forward(mq_layer *layer, const mq_layer_context *context, const mq_unit *unit, void *hidden,
                     const mq_scratch *scratch, mq_error *err);

/* Rows of the run that go to one expert, no more than scratch has room for. */
typedef struct mq_expert_rows {
    const void *hidden;                 /* (rows of the run, C), behind the attention half */
    void *sums;                         /* (rows of the run, C): what the experts add up to */
    const int64_t *tokens;              /* (count): rows of the run, each once */
    const float *shares;                /* (count) */
    int64_t count;
    int64_t position;                   /* of the first in the order of all experts' rows */
} mq_expert_rows;

/* sums[token] += share * expert(norm(hidden[token])), by the expert whose weights are loaded. */
int mq_layer_expert(mq_layer *layer, const mq_layer_context *context, const mq_expert_rows *rows,
                    const mq_scratch *scratch, mq_error *err);

/* Attention over one sequence of so many tokens (layer NULL: as large as any layer's); where q, k, v and out are is
 * left to be said. */
mq_attention_args mq_layer_attention(const mq_layer_context *context, const mq_layer *layer, int64_t tokens);

/* Rope on x (tokens of the sequence, heads, head_dim), as the layer has it. */
mq_rope_sizes mq_layer_rope(const mq_layer_context *context, int64_t heads, const mq_sequence *sequence);
void mq_layer_turn(const mq_layer_context *context, const mq_layer *layer, void *x, int64_t heads,
                   const mq_sequence *sequence);

/* Where there is no rope, what q (tokens of the sequence, heads, head_dim) is multiplied by as positions grow
 * (Llama 4). */
float mq_layer_growth(const mq_layer_context *context, int64_t position);
void mq_layer_grow(const mq_layer_context *context, const mq_layer *layer, void *q, const mq_sequence *sequence);
/* Keys that are padding, and where chunks begin that way. */
void mq_layer_hide_padding(const mq_layer_context *context, const mq_sequence *sequence, mq_attention_args *args);
/* k and v (rows, heads, ...) of what latent attention's second linear makes, expanded (rows, heads, plain and value),
 * and of the end of narrow (rows, kv_lora_rank + qk_rope_head_dim). */
void mq_layer_expand(const mq_layer_context *context, int64_t rows, void *k, void *v, const void *expanded,
                     const void *narrow);

/* Whether every quantizer of the layer can be applied to what it will see. */
int mq_layer_check(const mq_layer *layer, const mq_config *config, mq_error *err);

/* All points of a layer, or as many as fit; returns how many there are. */
enum { MQ_LAYER_MAX_POINTS = 2 * MQ_ROLE_COUNT + 3 };
size_t mq_layer_points(mq_layer *layer, mq_point **out);

/* Statistics of one run over a set of points (points.c): begin makes one watching calibrator per site and kind,
 * collect adds rows to those of one site, end merges them into the calibrators of their points (if keep) and drops
 * them. A tensor that several siblings read is scanned once, and an interrupted run leaves the calibrators as they
 * were. */
int mq_points_begin(mq_point **points, size_t count, mq_spare *spare, mq_error *err);
int mq_points_end(mq_point **points, size_t count, int keep, mq_error *err);
int mq_point_collect(mq_point *point, const mq_calib_rows *rows, mq_error *err);
int mq_point_has_calib(const mq_point *point);
int mq_point_is_watched(const mq_point *point);      /* while a run is on */
int mq_point_by_group(const mq_point *point);        /* ... by a kind that wants rows group by group */
/* Everything collected so far comes before all that follows (mq_calib_settle). */
int mq_points_settle(mq_point **points, size_t count, mq_error *err);
int mq_points_must_settle(mq_point **points, size_t count);

#endif
