/* Another place than the host where layers are computed: a device (csrc/backend/device.h). A runtime that has one hands
 * it the weights that are loaded and the work on them. Hidden states are the host's from call to call, and so are
 * routes, and the sums of experts when a layer's are done; calibrators get what they would have got on the host. */
#ifndef MQ_ELSEWHERE_H
#define MQ_ELSEWHERE_H

#include "calib/calib.h"
#include "model/ops.h"

struct mq_run;
struct mq_runtime;
struct mq_module;
struct mq_named_tensor;
struct mq_backward;

/* What is to be read off the last hidden states, rows first_row to first_row + rows of the run. */
typedef struct mq_head_request {
    struct mq_run *run;
    const float *norm;              /* (C): weight of the final norm */
    const mq_tensor *weight;        /* (V, C) */
    const mq_stored_weight *stored; /* not NULL: what stands for it, and weight is without data */
    const char *name;               /* of the weight */
    int64_t first_row, rows;
    float *logits;                  /* (rows, V), or NULL */
    mq_loss_row *losses;            /* (rows), or NULL */
    const int32_t *labels;          /* (rows), < 0 = none */
} mq_head_request;

/* The same on the way back, of all rows of a run. */
typedef struct mq_back_head_request {
    const float *norm;              /* (C) */
    const mq_tensor *weight;        /* (V, C) */
    const char *name;               /* of the weight */
    float *d_norm, *d_weight;       /* are added to; NULL = not wanted */
    const mq_loss_row *losses;      /* (rows) each: as the forward left them; labels, < 0 = none; factors of losses */
    const int32_t *targets;
    const float *factors;
} mq_back_head_request;

/* Rows first to first + count of the dispatch, of one expert. */
typedef struct mq_back_expert_rows {
    int64_t layer, expert, first, count;
} mq_back_expert_rows;

typedef struct mq_elsewhere mq_elsewhere;
struct mq_elsewhere {
    /* Room for a layer (expert -1) or for one of its experts, whose tensors these are; then they come one by one: a
     * linear's weight (O, I), or what stands for it (stored; weight is without data then), and its bias (O) or NULL; or
     * a norm (weight NULL). */
    int (*begin)(mq_elsewhere *self, const struct mq_runtime *runtime, int64_t layer, int64_t expert,
                 const struct mq_named_tensor *tensors, size_t count, mq_error *err);
    int (*load)(mq_elsewhere *self, const struct mq_runtime *runtime, const struct mq_module *module,
                const mq_tensor *weight, const mq_stored_weight *stored, const float *vector, mq_error *err);
    /* The same for a part that will be wanted next, whichever that is, while another is at work: begin finds there what
     * came ahead if it is given the same tensors, at the same places. Until then, or until it is forgotten, these must
     * stay where they are and as they are. One part at a time; *room: whether there is any, else nothing comes. Norms
     * need not come ahead, nor need all linears. */
    int (*begin_ahead)(mq_elsewhere *self, const struct mq_runtime *runtime, int64_t layer, int64_t expert,
                       const struct mq_named_tensor *tensors, size_t count, int *room, mq_error *err);
    int (*load_ahead)(mq_elsewhere *self, const struct mq_runtime *runtime, const struct mq_module *module,
                      const struct mq_named_tensor *weight, const mq_tensor *bias, mq_error *err);
    void (*forget_ahead)(mq_elsewhere *self);
    int (*load_low_rank)(mq_elsewhere *self, const struct mq_module *module, const mq_tensor *down,
                         const mq_tensor *up, mq_error *err);
    void (*drop_layer)(mq_elsewhere *self, int64_t layer);
    void (*drop_expert)(mq_elsewhere *self);
    /* mq_run_steps of mq_layer_forward over all units, and of mq_layer_expert over rows first to first + count of the
     * dispatch. */
    int (*layer)(mq_elsewhere *self, struct mq_run *run, int64_t layer, mq_error *err);
    int (*expert)(mq_elsewhere *self, struct mq_run *run, int64_t layer, int64_t first, int64_t count, mq_error *err);
    /* All experts of a layer are done: their sums are to be the host's. */
    int (*end_experts)(mq_elsewhere *self, struct mq_run *run, mq_error *err);
    int (*head)(mq_elsewhere *self, const mq_head_request *request, mq_error *err);
    /* Statistics of what reaches lm_head, whose calibrators have begun. norm (C): weight of the final norm; the host
     * would look at pieces of so many rows. */
    int (*head_statistics)(mq_elsewhere *self, struct mq_run *run, const float *norm, int64_t piece_rows,
                           mq_error *err);
    /* The way back (backward.h): from losses to the last hidden states; through a layer that is loaded, whose experts,
     * if it has any, have been gone through, and whose observer is yet to see their end; through the expert that is
     * loaded. */
    int (*back_head)(mq_elsewhere *self, struct mq_backward *back, const mq_back_head_request *request, mq_error *err);
    int (*back_layer)(mq_elsewhere *self, struct mq_backward *back, int64_t layer, const void *input, mq_error *err);
    int (*back_expert)(mq_elsewhere *self, struct mq_backward *back, const mq_back_expert_rows *rows, mq_error *err);
    /* The memory of a run, or of a way back, is about to be freed. */
    void (*forget_run)(mq_elsewhere *self, const struct mq_run *run);
    void (*forget_backward)(mq_elsewhere *self, const struct mq_backward *back);
};

#endif
