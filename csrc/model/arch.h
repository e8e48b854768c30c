/* The table of model families and of the modules in a decoder layer (archs.def). A family made of known operations is
 * a row. */
#ifndef MQ_ARCH_H
#define MQ_ARCH_H

#include "model/config.h"

enum {
    MQ_FAMILY_QKV_BIAS = 1 << 0,   /* q, k and v have a bias, whatever the config says (Qwen2) */
    MQ_FAMILY_BIAS_KEYS = 1 << 1,  /* attention_bias and mlp_bias of the config decide */
    MQ_FAMILY_QK_NORM = 1 << 2     /* RMS norm over each head of q and k, before rope (Qwen3) */
};

typedef struct mq_family {
    const char *name, *model_types, *architectures;
    unsigned flags;
} mq_family;

typedef enum mq_module_kind {
    MQ_MODULE_LINEAR,
    MQ_MODULE_EMBEDDING,
    MQ_MODULE_NORM,
    MQ_MODULE_ATTENTION
} mq_module_kind;

/* What a module does in its layer. */
typedef enum mq_role {
    MQ_ROLE_ATTENTION, MQ_ROLE_Q, MQ_ROLE_K, MQ_ROLE_V, MQ_ROLE_O, MQ_ROLE_Q_NORM, MQ_ROLE_K_NORM,
    MQ_ROLE_GATE, MQ_ROLE_UP, MQ_ROLE_DOWN, MQ_ROLE_INPUT_NORM, MQ_ROLE_POST_NORM,
    MQ_ROLE_EMBED, MQ_ROLE_FINAL_NORM, MQ_ROLE_HEAD, MQ_ROLE_COUNT
} mq_role;

typedef enum mq_dim {
    MQ_DIM_NONE,
    MQ_DIM_HIDDEN,
    MQ_DIM_INNER,
    MQ_DIM_Q,
    MQ_DIM_KV,
    MQ_DIM_HEAD,
    MQ_DIM_KV_HEADS
} mq_dim;
typedef enum mq_condition {
    MQ_IF_ALWAYS,
    MQ_IF_NEVER,
    MQ_IF_QKV_BIAS,
    MQ_IF_O_BIAS,
    MQ_IF_MLP_BIAS,
    MQ_IF_QK_NORM
} mq_condition;

typedef struct mq_layer_module {
    mq_role role;
    mq_module_kind kind;
    const char *name, *site;
    mq_dim rows, cols;
    mq_condition present, bias;
} mq_layer_module;

const mq_family *mq_families(size_t *count);
const mq_family *mq_family_find(const char *name);   /* NULL if there is none */
const mq_layer_module *mq_layer_modules(size_t *count);
const char *mq_module_kind_name(mq_module_kind kind);
const char *mq_family_flag_name(unsigned flag);      /* of one bit; NULL beyond the last */

int64_t mq_dim_of(const mq_config *config, mq_dim dim);
int mq_condition_holds(const mq_family *family, const mq_config *config, mq_condition condition);

#endif
