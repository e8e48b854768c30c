/* mq_runtime: one model, without the weights: its sizes, its modules by name, what sits at its points, and the layers
 * that are loaded at the moment. mq_run: recorded batches on their way through it, one layer at a time. */
#ifndef MQ_RUNTIME_H
#define MQ_RUNTIME_H

#include "model/elsewhere.h"
#include "model/layer.h"

enum { MQ_NAME_SIZE = 96 };

typedef struct mq_module {
    char name[MQ_NAME_SIZE], site[MQ_NAME_SIZE];   /* site: "" for what is not a linear */
    char weight[MQ_NAME_SIZE], bias[MQ_NAME_SIZE]; /* names of tensors, "" for none */
    mq_role role;
    mq_module_kind kind;
    int64_t layer;                                 /* -1: outside the layers */
    int64_t expert;                                /* -1: of none */
    int64_t shape[2];
    int ndim;                                      /* of shape */
} mq_module;

typedef struct mq_named_tensor {
    const char *name;
    mq_tensor tensor;
    const mq_stored_weight *stored; /* NULL, or the parts that stand for it: then tensor is without data, and only the
                                     * weight of a linear may be so */
} mq_named_tensor;

/* Tensors that come to another place before they are wanted (mq_elsewhere.begin_ahead). */
typedef struct mq_ahead {
    int64_t layer, expert;        /* layer -1: none are coming, or all have come */
    const mq_named_tensor *tensors;     /* the caller's */
    size_t count, next;           /* next: of the layer's modules */
} mq_ahead;

typedef struct mq_runtime {
    const mq_family *family;
    mq_config config;
    mq_dtype dtype;               /* of activations: MQ_F32 or MQ_BF16 */
    mq_gemm_kind gemm;
    mq_module *modules;           /* in the order of named_modules */
    size_t module_count;
    size_t *layer_start;          /* modules of layer i: layer_start[i] to layer_start[i + 1] */
    const mq_module **by_name;    /* sorted */
    mq_layer *layers;
    mq_point head_input;          /* of lm_head */
    mq_observer *head_observer;   /* of the logits' gradient; not owned; NULL = none */
    unsigned layer_ropes;         /* bits 1 << MQ_LAYER_*: which ropes layers have */
    int64_t rank;                 /* of the widest branch of low rank that was ever loaded */
    void *gathered;               /* memory of weights that were gathered (mq_runtime_gather) */
    mq_elsewhere *elsewhere;      /* where layers are computed; not owned; NULL = here */
    mq_ahead ahead;
} mq_runtime;

/* What differs from layer to layer; each an array or NULL. */
typedef struct mq_per_layer {
    const int64_t *windows;       /* attention window; NULL = config.sliding_window everywhere */
    const int64_t *experts;       /* 0 = an MLP; NULL = experts everywhere if config.num_experts says so */
    const int64_t *ropes;         /* MQ_LAYER_*; NULL = MQ_LAYER_ROPE everywhere */
    const int64_t *chunks;        /* of attention; NULL = none */
    const int64_t *attention, *mlp;     /* MQ_BLOCK_*; NULL = MQ_BLOCK_FULL everywhere */
    const int64_t *kv_heads, *inner;    /* 0, or NULL = as in the config; not more than that */
} mq_per_layer;

int mq_runtime_init(mq_runtime *runtime, const mq_family *family, const mq_config *config, mq_dtype dtype,
                    const mq_per_layer *layers, mq_error *err);
void mq_runtime_free(mq_runtime *runtime);

/* NULL if there is no module, or no point, of that name. */
const mq_module *mq_runtime_module(const mq_runtime *runtime, const char *name, size_t length);
mq_point *mq_runtime_point(mq_runtime *runtime, const char *name, int64_t *layer);

/* Exactly the tensors that layer needs, by name, its experts' left out. The old weights are dropped first. */
int mq_runtime_load_layer(mq_runtime *runtime, int64_t layer, const mq_named_tensor *tensors, size_t count,
                          mq_error *err);
void mq_runtime_drop_layer(mq_runtime *runtime, int64_t layer);

/* Puts a branch of low rank beside a linear of a layer (not of an expert): down [rank, I], up [O, rank], of any float
 * dtype. It goes with the layer's weights. */
int mq_runtime_load_low_rank(mq_runtime *runtime, const mq_module *module, const mq_tensor *down, const mq_tensor *up,
                             mq_error *err);

/* Every given tensor must be one that the layer (expert -1), or the expert, has: a surplus one is a mistake that would
 * go unnoticed. */
int mq_runtime_check_names(const mq_runtime *runtime, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                           size_t count, mq_error *err);

/* The modules of one expert, MQ_EXPERT_LINEARS of them. */
enum { MQ_EXPERT_LINEARS = 3 };
const mq_module *mq_runtime_expert(const mq_runtime *runtime, int64_t layer, int64_t expert);
/* Exactly the tensors of one expert; they take the place of another's. drop frees them. */
int mq_runtime_load_expert(mq_runtime *runtime, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                           size_t count, mq_error *err);
void mq_runtime_drop_expert(mq_runtime *runtime, int64_t layer);
/* Takes the weights of the loaded expert out, MQ_EXPERT_LINEARS of them, which are the caller's then; puts such in for
 * a while, and with NULL takes them out again. */
void mq_runtime_take_expert(mq_runtime *runtime, int64_t layer, mq_linear_weight *weights);
void mq_runtime_lend_expert(mq_runtime *runtime, int64_t layer, const mq_linear_weight *weights);

/* Has weights of a layer (expert -1) or of an expert come to where layers are computed while another is at work there:
 * each call of mq_runtime_ahead sends one, as long as it says that there are more. Whoever loads that part with the
 * same tensors then finds them there. Some of the part's tensors, the biases of their linears among them; they stay
 * the caller's, unchanged, until the part is loaded or forgotten. *room: 0 = there is none, or layers are computed
 * here: nothing will come. */
int mq_runtime_begin_ahead(mq_runtime *runtime, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                           size_t count, int *room, mq_error *err);
int mq_runtime_ahead(mq_runtime *runtime, int *more, mq_error *err);
void mq_runtime_forget_ahead(mq_runtime *runtime);

/* Moves the packed weights of the loaded layers, and the others given, into one memory, for those who read them over
 * and over: it lives as long as the runtime. Once; weights that are loaded later stay where they are. */
int mq_runtime_gather(mq_runtime *runtime, mq_linear_weight *const *others, size_t count, mq_error *err);

/* Where the observer of a module's output is kept: a linear that is no expert's, a layer's experts, or lm_head; NULL:
 * of nothing else. */
mq_observer **mq_runtime_observer(mq_runtime *runtime, const mq_module *module);

/* A module outside the layers, or NULL. */
const mq_module *mq_runtime_outer(const mq_runtime *runtime, mq_role role);
/* The tensor of that name with that shape and a float dtype, or an error that says which one is wrong. find_weight also
 * takes one that is stored as parts. */
const mq_named_tensor *mq_find_weight(const mq_named_tensor *tensors, size_t count, const mq_module *module,
                                      mq_error *err);
const mq_tensor *mq_find_tensor(const mq_named_tensor *tensors, size_t count, const char *name, const int64_t *shape,
                                int ndim, mq_error *err);
/* The weight of a norm as it is multiplied by; NULL with err filled on failure. */
float *mq_read_norm(const mq_runtime *runtime, const mq_tensor *tensor, const char *name, mq_error *err);
/* A float32 copy of a vector, rounded through dtype; NULL with err filled on failure. */
float *mq_read_vector(const mq_tensor *tensor, mq_dtype dtype, const char *name, mq_error *err);

#endif
