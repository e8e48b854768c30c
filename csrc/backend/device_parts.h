/* The inside of a mq_device, which its files share: memory (device.c), weights (device_weights.c), findings
 * (device_findings.c), layers (device_layer.c and, behind device_pass.h, its parts; device_chunks.c), experts
 * (device_experts.c), the head (device_head.c, device_head_statistics.c). */
#ifndef MQ_DEVICE_PARTS_H
#define MQ_DEVICE_PARTS_H

#include "backend/device.h"

/* Memory that is cut into pieces from its start, and all given back at once. */
typedef struct mq_arena {
    char *memory;
    size_t nbytes, used;
} mq_arena;

typedef struct mq_device_linear {
    mq_cuda_matrix weight;      /* data NULL: it stays codes, in packed */
    mq_cuda_linear packed;      /* codes NULL: it is numbers */
    mq_cuda_path prepared_for;  /* the only path that reads what packed.prepared is */
    void *bias;                 /* of the activations' dtype, or NULL */
    mq_cuda_matrix down, up;    /* the branch of low rank; data NULL = none */
    void *branch;               /* their memory */
    int came_ahead;             /* while another part was at work */
} mq_device_linear;

/* What a weight was made of: the same again gives the same weight, as long as the memory is held and not written. */
typedef struct mq_weight_source {
    const void *memory[4];      /* of numbers or codes, scales, second scales, bias; [0] NULL = not known */
    int64_t stride[MQ_MAX_NDIM];
    int64_t block_cols;
    int dtype, scheme;          /* scheme: 0 = none */
    int rounded;                /* what a scheme's numbers are rounded to */
    uint64_t scaling;           /* of numbers that are yet to be quantized: a hash of what scales them */
} mq_weight_source;

/* The part that is sent before it is wanted. */
typedef struct mq_device_ahead {
    int64_t layer, expert;      /* layer -1: there is none */
    mq_device_linear linears[MQ_ROLE_COUNT];    /* of those that have a source */
    mq_weight_source sources[MQ_ROLE_COUNT];
} mq_device_ahead;

/* Largest magnitudes that were found on the device and are to come to the host. */
typedef struct mq_finding {
    mq_calib *watch;            /* a calibrator of kind max; NULL: of a weight, which is to be finite */
    const char *name;           /* of the weight */
    int64_t at, width, seen;    /* where they are; how many; rows that they are of */
} mq_finding;

/* What candidates of a layer's experts change, on the device (device_score_experts.c). */
typedef struct mq_device_changes {
    const struct mq_experts_score *score;   /* whose; NULL = nobody's */
    char *memory;               /* NULL: they are on the host */
    size_t nbytes;
    int64_t rows, width;        /* of the run */
} mq_device_changes;

/* Of all rows of a run, on the device from a layer's first expert to its last (device_mixture.c). */
typedef struct mq_device_mixture {
    const mq_run *run;          /* whose; NULL = nobody's */
    char *memory;               /* hidden states, then sums of experts; NULL: they are on the host */
    size_t nbytes;
} mq_device_mixture;

/* A statistic that is summed up on the device (device_sums.c). */
enum { MQ_SUMS_ENTRIES = 16 };

typedef struct mq_device_sums {
    mq_calib *watch;            /* NULL = free */
    void *memory;
    size_t nbytes;
    int64_t width, rows;
    mq_dtype dtype;
    int64_t first;              /* of a histogram: the first piece that was counted */
    int64_t entry_count, entry_room;    /* of columns: one after the other, and what each is of */
    mq_calib_sums entries[MQ_SUMS_ENTRIES];
} mq_device_sums;

enum {
    MQ_SUMS = 64,
    MQ_FINDINGS = 256,          /* and how many numbers they may be: */
    MQ_MAXIMA = 1 << 16,
    MQ_PIECE_NBYTES = 16 << 20, /* of a weight on its way, at most */
    MQ_CHUNK_ROWS = 8192,       /* rows of a chunk, at most; and as many that */
    MQ_ENOUGH_ROWS = 2048,      /* weights that come ahead have room before there are more */
    MQ_QUANTIZERS = MQ_LAYER_MAX_POINTS + 1,    /* places of mq_device.quantizers; the last is lm_head's */
    MQ_PINS = 8,                /* pieces of others' memory that are pinned, at most, */
    MQ_PINNED_SHARE = 4,        /* which together are a fourth of the host's, at most */
    MQ_ALIGN_DEVICE = 256
};

/* Memory of the host for what is on its way; pinned, where that may be had. */
typedef struct mq_pinned {
    void *memory;
    size_t nbytes;
    int is_plain;
    void *passed;               /* event: behind its last copy */
} mq_pinned;

/* Memory of others on the host that is pinned. */
typedef struct mq_pin {
    void *memory;
    size_t nbytes;
} mq_pin;

struct mq_device {
    mq_elsewhere elsewhere;     /* first */
    const mq_backend *backend;
    int index;
    size_t budget, held, peak;
    void *compute, *copies, *rows;      /* streams: copies is for weights, rows for activations */
    void *loaded;               /* event: behind the last weight */
    void *arrived[2], *computed[2];     /* events: behind a chunk's rows, and behind what was made of them */
    mq_cuda_gemm *gemm;
    mq_cuda_workspace workspace;
    void *workspace_memory;
    mq_arena layer_weights, expert_weights, work;
    mq_arena spare[2];          /* for the weights of a layer, and of an expert, that come next */
    mq_device_ahead ahead;
    int64_t layer;              /* whose weights are there; -1 = none */
    mq_device_linear linears[MQ_ROLE_COUNT];
    float *norms[MQ_ROLE_COUNT];
    char *pinned[2], *staged[2];/* pieces of weights: on the host, and on the device before conversion */
    void *sent[2];              /* events: behind the copy of that piece */
    int next_piece;
    mq_pinned indices[2], gathered[2];  /* of chunks; rows of experts */
    int next_indices;
    mq_pin pins[MQ_PINS];       /* the newest first */
    int64_t piece_nbytes;
    float *maxima;              /* [MQ_MAXIMA] on the device */
    mq_finding findings[MQ_FINDINGS];
    int64_t finding_count, maxima_used;
    mq_device_sums sums[MQ_SUMS];
    int host_statistics;        /* as in mq_device_options */
    mq_device_changes changes;
    mq_device_mixture mixture;
    int64_t copied;             /* tensors that came to the host to be looked at there */
    mq_device_quantizer quantizers[MQ_QUANTIZERS];
    int64_t products[MQ_CUDA_PATHS];    /* of weights that stay codes, by the path that they took */
};

/* Rows on their way through a layer: a chunk of whole sequences, or rows gathered for an expert. */
typedef struct mq_device_chunk {
    int64_t first_sequence, sequences, first, rows, longest;
    const int64_t *tokens;      /* rows of the run, of an expert's; NULL = from first on */
    const uint8_t *mask;        /* [rows] on the host: rows that count; NULL = all */
    int64_t counted;            /* how many count */
    int64_t position;           /* of the first row in the order of statistics */
    const mq_unit *units;       /* of the run; NULL: of an expert's rows, pieces of so many from piece_first on */
    int64_t unit_count, piece_rows, piece_first;
    void *hidden;               /* (rows, C) on the device */
    int64_t *starts, *index;    /* on the device: [sequences + 1]; [counted] rows that count */
    int64_t *chunk_first;       /* [sequences]: where chunks of attention are counted from */
    int32_t *positions;         /* [rows] of the layer's rope table (mq_device_rope) */
    float *growth;              /* [rows]: what queries are multiplied by where there is no rope */
    float *shares;              /* [rows]: what an expert's input is multiplied by, or NULL */
    uint8_t *key_mask;          /* [rows], or NULL */
} mq_device_chunk;

/* The device's memory for one chunk, cut from mq_device.work; and a second place for the rows of the next. */
typedef struct mq_device_scratch {
    void *hidden[2], *meta[2];
    size_t meta_nbytes;
    void *normed, *joined, *q, *k, *v, *mixed, *quantized, *temporary, *prepared, *low, *gate, *up, *router, *counted;
    void *latent, *expanded;    /* of linears between which something is narrow */
    float *factors;             /* [rows] */
    int32_t *experts;
    float *shares;
    float *cosine, *sine;       /* the model's rope tables, one behind the other */
    void *attention;
    size_t attention_nbytes;
    int64_t rows;               /* that there is room for */
} mq_device_scratch;

/* ---- device.c ---- */

/* The calling thread's device becomes this one; leave puts back what it was. */
int mq_device_enter(mq_device *device, int *before, mq_error *err);
void mq_device_leave(mq_device *device, int before);
/* Room for nbytes; what was in it is gone. MQ_ERR_MEMORY says what it was to be for, and what may be used. */
int mq_arena_reserve(mq_device *device, mq_arena *arena, size_t nbytes, const char *purpose, mq_error *err);
void mq_arena_drop(mq_device *device, mq_arena *arena);
void *mq_arena_take(mq_arena *arena, size_t nbytes);    /* of a reserved one; arenas without memory only count */
/* Memory that counts in the budget, for which that of weights ahead is given up; MQ_ERR_MEMORY where there is no room,
 * err may be NULL. */
int mq_device_take(mq_device *device, void **out, size_t nbytes, const char *purpose, mq_error *err);
void mq_device_give(mq_device *device, void **memory, size_t nbytes);
/* What arena could hold: one that is no spare. */
size_t mq_device_available(const mq_device *device, const mq_arena *arena);
/* Waits for all that was asked of the device, whatever becomes of it: behind every error, and before memory of the host
 * that copies may be on their way to is freed. */
void mq_device_settle(mq_device *device);
/* Has the device read and write this memory of the host while the host goes on, if it may be so and is not too much;
 * until the memory is said to be gone, or others need the place. beside: it takes the place of nothing. */
void mq_device_pin(mq_device *device, void *memory, size_t nbytes, int beside);
void mq_device_unpin(mq_device *device, const void *memory);
/* Room for nbytes; what was in it is gone, which no copy may need any more. */
int mq_pinned_reserve(mq_device *device, mq_pinned *it, size_t nbytes, mq_error *err);

/* ---- device_weights.c ---- */

/* to = w (rows of w, columns), converted to to's dtype, on the copy stream. */
int mq_device_upload(mq_device *device, const mq_tensor *w, const mq_cuda_matrix *to, mq_error *err);
/* Calls of mq_elsewhere. */
int mq_device_begin(mq_elsewhere *self, const mq_runtime *runtime, int64_t layer, int64_t expert,
                    const mq_named_tensor *tensors, size_t count, mq_error *err);
int mq_device_load(mq_elsewhere *self, const mq_runtime *runtime, const mq_module *module, const mq_tensor *weight,
                   const mq_stored_weight *stored, const float *vector, mq_error *err);
int mq_device_load_low_rank(mq_elsewhere *self, const mq_module *module, const mq_tensor *down, const mq_tensor *up,
                            mq_error *err);
void mq_device_drop_layer(mq_elsewhere *self, int64_t layer);
void mq_device_drop_expert(mq_elsewhere *self);
/* Bytes of the modules of one layer, or of one of its experts, on the device. */
size_t mq_device_weights_nbytes(const mq_device *device, const mq_runtime *runtime, int64_t layer, int64_t expert,
                                const mq_named_tensor *tensors, size_t count);
/* Of a linear's weight and bias among them; dtype: of activations. */
size_t mq_device_linear_nbytes(const mq_device *device, const mq_module *module, mq_dtype dtype,
                               const mq_stored_weight *stored);
/* A linear as mq_elsewhere.load has it. */
typedef struct mq_given_linear {
    const mq_module *module;
    const mq_tensor *weight;
    const mq_stored_weight *stored;
    const float *bias;
} mq_given_linear;
/* It comes into memory of the arena; *linear says where. */
int mq_device_put_linear(mq_device *device, mq_arena *arena, mq_dtype dtype, const mq_given_linear *given,
                         mq_device_linear *linear, mq_error *err);

/* ---- device_ahead.c ---- */

int mq_device_begin_ahead(mq_elsewhere *self, const mq_runtime *runtime, int64_t layer, int64_t expert,
                          const mq_named_tensor *tensors, size_t count, int *room, mq_error *err);
int mq_device_load_ahead(mq_elsewhere *self, const mq_runtime *runtime, const mq_module *module,
                         const mq_named_tensor *weight, const mq_tensor *bias, mq_error *err);
void mq_device_forget_ahead(mq_elsewhere *self);
/* What came ahead of that part is its weights now, if it was made of these tensors: nonzero then. If of others, it is
 * forgotten. */
int mq_device_take_ahead(mq_device *device, const mq_runtime *runtime, int64_t layer, int64_t expert,
                         const mq_named_tensor *tensors, size_t count);
/* Frees the memory for what comes ahead, and forgets what did: whether there was any. */
int mq_device_give_spare(mq_device *device);

/* ---- device_packed.c ---- */

/* Whether a weight stays codes there (stored NULL: it does not), and then how many bytes it takes. */
int mq_device_can_pack(const mq_device *device, mq_role role, const mq_stored_weight *stored);
size_t mq_device_packed_nbytes(const mq_device *device, const mq_stored_weight *stored);
/* *out = the weight in memory of so many bytes; dtype: of activations. On the copy stream. */
int mq_device_put_packed(mq_device *device, char *memory, const char *name, const mq_stored_weight *stored,
                         mq_dtype dtype, mq_device_linear *out, mq_error *err);

/* ---- device_products.c ---- */

/* *linear: a weight that stays codes, and the quantizer of its input (may be NULL) as part of the product; whether a
 * product of such codes there is. has_amax: then it needs that number (input_amax). */
int mq_device_is_narrow(const mq_device *device, mq_dtype dtype, const mq_device_linear *weights,
                        const mq_quantizer *quantizer, mq_cuda_linear *linear);
int mq_device_has_amax(const mq_quantizer *quantizer, const mq_cuda_linear *linear);
/* A product with codes, which is counted. */
int mq_device_run_packed(mq_device *device, const mq_cuda_linear_job *job, mq_error *err);

/* ---- device_findings.c ---- */

int mq_finding_weight(mq_device *device, const mq_cuda_matrix *w, const char *name, mq_error *err);
int mq_finding_rows(mq_device *device, mq_calib *watch, const mq_cuda_matrix *x, mq_error *err);
/* Waits, and gives everybody what was found; a weight that is not finite is an error. */
int mq_findings_take(mq_device *device, mq_error *err);
/* The end of work that rc became of: what it found is given out, or forgotten after an error; nothing is under way. */
int mq_device_finish(mq_device *device, int rc, mq_error *err);
void mq_findings_drop(mq_device *device);
/* Rows that reach a point. by_sequence, by_batch: the host looks at them sequence by sequence, and at no two batches at
 * once (pass.c), which decides what the first data of a histogram are, and what averages are made of. */
typedef struct mq_device_look {
    mq_cuda_matrix x;
    const mq_device_chunk *chunk;
    const mq_layer_context *context;
    int by_sequence, by_batch;
} mq_device_look;

/* Statistics at a point, on the device, or where there is no room for them from a copy on the host. room: for rows. */
int mq_device_collect(mq_device *device, mq_point *point, const mq_device_look *look, void *room, mq_error *err);
/* Where the rows of the chunk end that the host's threads would look at in one call (pass.c) with row `begin`; key:
 * where those begin, in the order of the data. */
int64_t mq_device_piece(const mq_device_look *look, int64_t begin, int64_t *key);
/* The recorded batch that row i of the chunk is of. */
int64_t mq_device_batch(const mq_device_look *look, int64_t i);

/* ---- device_sums.c ---- */

/* The rows that count, x, to what is summed up for a calibrator that is not of kind max; *done: there was room. */
int mq_sums_collect(mq_device *device, mq_calib *watch, const mq_device_look *look, const mq_cuda_matrix *x, int *done,
                    mq_error *err);
/* Room for what will be summed up of a layer (NULL: before lm_head), before its rows take the rest. */
void mq_sums_begin(mq_device *device, const mq_run *run, const mq_layer *layer, mq_point *const *points, size_t count);
/* All sums to their calibrators. */
int mq_sums_take(mq_device *device, mq_error *err);
void mq_sums_drop(mq_device *device);

/* ---- device_mixture.c ---- */

/* Whether rows of experts are gathered and added on the device. */
int mq_device_mixes(mq_device *device, const mq_run *run);
/* out [row] = the hidden states of a token; sums [token] += share * made [row]. tokens, shares: of the device. */
int mq_device_gather(mq_device *device, const mq_cuda_matrix *out, const int64_t *tokens, mq_error *err);
int mq_device_scatter(mq_device *device, const mq_cuda_matrix *made, const int64_t *tokens, const float *shares,
                      mq_error *err);
int mq_device_end_experts(mq_elsewhere *self, mq_run *run, mq_error *err);
void mq_device_drop_mixture(mq_device *device);

/* ---- device_score_experts.c ---- */

void mq_device_drop_changes(mq_device *device);

/* ---- device_layer.c ---- */

/* One trip of a chunk through a layer, as layer.c's pass. */
typedef struct mq_device_pass {
    mq_device *device;
    mq_layer *layer;
    const mq_layer_context *context;
    const mq_device_scratch *scratch;
    const mq_device_chunk *chunk;
    mq_error *err;
    const mq_quantizer *applied;    /* whose result scratch->quantized holds */
} mq_device_pass;

mq_cuda_matrix mq_device_matrix(const mq_device_pass *pass, void *data, int64_t width);
/* *in becomes its norm in out, where the layer has that norm. */
int mq_device_normed(mq_device_pass *pass, mq_role role, void *out, const void **in);
int mq_device_expert(mq_device_pass *pass);
int mq_device_run_chunk(mq_device_pass *pass);
/* Heads of a chunk's queries or keys, x (rows, heads * head_dim), or gradients by these. */
typedef struct mq_device_heads {
    mq_device *device;
    const mq_layer_context *context;
    const mq_layer *layer;
    const mq_device_chunk *chunk;
    const float *cosine, *sine;         /* all of the model's */
    mq_cuda_matrix x;
    int64_t count;
    mq_error *err;
} mq_device_heads;
/* mq_layer_turn, and mq_layer_grow, which is its own way back; each does nothing in the other's layers. */
int mq_device_turn(const mq_device_heads *heads);
int mq_device_grow(const mq_device_heads *heads);
/* What turning is made of: the rope of a layer that has one, and the norm behind it of families that have that. */
mq_cuda_rope_job mq_device_rope(const mq_device_heads *heads);
mq_cuda_norm_job mq_device_unit_norm(const mq_device_heads *heads);
/* layer NULL: as large as any layer's. */
mq_cuda_attention_job mq_device_attention(const mq_layer_context *context, const mq_layer *layer, int64_t rows,
                                          int64_t sequences, int64_t longest);
/* Of a chunk: with its indices and the layer's sinks, without rows and room. */
mq_cuda_attention_job mq_device_attention_of(const mq_device *device, const mq_layer_context *context,
                                             const mq_layer *layer, const mq_device_chunk *chunk);

/* ---- device_chunks.c ---- */

/* Bytes that chunks of so many rows need, of sequences of up to `longest` tokens. */
typedef struct mq_device_need {
    size_t (*nbytes)(const void *context, int64_t rows, int64_t longest);
    const void *context;
} mq_device_need;
/* What weights that come ahead have, or would: as much as those at work. */
size_t mq_device_ahead_nbytes(const mq_device *device);
/* As many of `rows` as there is room for, but no less than the longest sequence. */
int64_t mq_device_most_rows(const mq_device_need *need, size_t room, int64_t rows, int64_t longest);
/* device->work becomes as large as chunks of as many of *rows as the budget lets need; *rows says how many those are.
 * MQ_ERR_MEMORY: not one sequence fits; says how long one may be. */
int mq_device_fit(mq_device *device, const mq_device_need *need, int64_t *rows, int64_t longest, mq_error *err);
/* Room for chunks of as many rows as the budget lets, whole sequences. rows: no more are needed. longest 0: of rows
 * that are no sequences, with nothing for attention. */
int mq_device_reserve(mq_device *device, mq_run *run, int64_t rows, int64_t longest, mq_device_scratch *out,
                      mq_error *err);
/* As many whole sequences from `first_sequence` on as there is room for in `most` rows. */
mq_device_chunk mq_device_chunk_from(const mq_run *run, int64_t first_sequence, int64_t most);
/* The model's rope tables, one behind the other: bytes of all cosines, or sines, and where a layer's begin. A layer
 * whose table depends on a sequence's length has two, and mq_device_chunk.positions says which one a row is in. */
size_t mq_device_ropes_nbytes(const mq_ropes *ropes);
int mq_device_send_ropes(mq_device *device, const mq_ropes *ropes, float *cosine, float *sine, mq_error *err);
int64_t mq_device_rope_at(const mq_ropes *ropes, int layer_rope);
/* The indices of a chunk to device memory, of so many bytes. */
size_t mq_device_indices_nbytes(int64_t rows);
int mq_device_send_indices(mq_device *device, const mq_run *run, mq_device_chunk *chunk, void *to, void *stream,
                           mq_error *err);
/* The run's work for meanwhile, as long as the host would have to wait for the event; all of it if that is NULL. */
int mq_device_meanwhile(mq_device *device, mq_run *run, void *event, mq_error *err);
/* work with the calibrators of the layer's points looking on, as mq_run_steps. */
typedef int (*mq_device_work)(mq_device *device, mq_run *run, mq_layer *layer, const void *context, mq_error *err);
int mq_device_watched(mq_device *device, mq_run *run, int64_t layer, mq_device_work work, const void *context,
                      mq_error *err);

int mq_device_run_layer(mq_elsewhere *self, mq_run *run, int64_t layer, mq_error *err);
int mq_device_run_expert(mq_elsewhere *self, mq_run *run, int64_t layer, int64_t first, int64_t count, mq_error *err);
int mq_device_run_head(mq_elsewhere *self, const mq_head_request *request, mq_error *err);
int mq_device_head_statistics(mq_elsewhere *self, mq_run *run, const float *norm, int64_t piece_rows, mq_error *err);

#endif
