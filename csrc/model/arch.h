/* The table of model families and of the modules in a decoder layer (archs.def). A family made of known operations is
 * a row. */
#ifndef MQ_ARCH_H
#define MQ_ARCH_H

#include "model/config.h"

enum {
    MQ_FAMILY_QKV_BIAS = 1 << 0,   /* q, k and v have a bias, o has none (Qwen2) */
    MQ_FAMILY_BIAS_KEYS = 1 << 1,  /* attention_bias and mlp_bias of the config decide */
    MQ_FAMILY_QK_NORM = 1 << 2,    /* RMS norm over each head of q and k, before rope (Qwen3) */
    MQ_FAMILY_MOE = 1 << 3,        /* layers may have a router and experts in the place of the MLP */
    MQ_FAMILY_BLOCK_SPARSE = 1 << 4, /* their tensors are named block_sparse_moe, w1, w3, w2 (Mixtral) */
    MQ_FAMILY_ROUTER_F32 = 1 << 5, /* the experts' shares of a token are not rounded to the model's dtype (Mixtral) */
    MQ_FAMILY_WIDE_QK_NORM = 1 << 6, /* RMS norm over all heads of q, and of k, together (OLMo 2) */
    MQ_FAMILY_POST_NORMS = 1 << 7, /* RMS norm of what each half of a layer adds (OLMo 2, Gemma 2) */
    MQ_FAMILY_NO_PRE_NORMS = 1 << 8, /* but not of what it reads (OLMo 2) */
    MQ_FAMILY_NORM_PLUS_ONE = 1 << 9, /* norms multiply by 1 + weight (Gemma) */
    MQ_FAMILY_FUSED = 1 << 10,     /* q, k and v come of one linear, gate and up of another (Phi-3) */
    MQ_FAMILY_SHARED_EXPERT = 1 << 11, /* beside experts, an MLP that every token goes through */
    MQ_FAMILY_SHARED_GATED = 1 << 12, /* whose output is multiplied by the sigmoid of a linear (Qwen2-MoE) */
    MQ_FAMILY_LATENT = 1 << 13,    /* keys and values come of one narrow vector, queries too (DeepSeek) */
    MQ_FAMILY_CORRECTED = 1 << 14, /* a vector is added to scores where experts are chosen (DeepSeek-V3) */
    MQ_FAMILY_BLOCKS = 1 << 15,    /* layers have sizes of their own, or lack a half (Llama-Nemotron) */
    MQ_FAMILY_SINKS = 1 << 16,     /* each head has a score for nothing (gpt-oss) */
    MQ_FAMILY_BIASED_EXPERTS = 1 << 17, /* experts and router have biases (gpt-oss) */
    MQ_FAMILY_FEED_FORWARD = 1 << 18, /* MLP and experts are named feed_forward (Llama 4) */
    MQ_FAMILY_SHARED_INPUTS = 1 << 19, /* an expert's input is multiplied by its share, not its output (Llama 4) */
    MQ_FAMILY_EXPERT_STACKS = 1 << 20 /* block_sparse_moe, but gate_proj, up_proj, down_proj (Granite) */
};

/* What the halves of one layer are. */
typedef enum mq_block { MQ_BLOCK_FULL, MQ_BLOCK_NONE, MQ_BLOCK_LINEAR } mq_block;
typedef struct mq_layer_kind {
    int experts;                /* whether it has any */
    mq_block attention, mlp;
    int64_t kv_heads, inner;    /* 0 = as in the config */
} mq_layer_kind;

typedef struct mq_family {
    const char *name, *models, *oracle, *model_types, *architectures;
    unsigned flags;
} mq_family;

typedef enum mq_module_kind {
    MQ_MODULE_LINEAR,
    MQ_MODULE_EMBEDDING,
    MQ_MODULE_NORM,
    MQ_MODULE_ATTENTION,
    MQ_MODULE_ROUTER,
    MQ_MODULE_EXPERTS,
    MQ_MODULE_VECTOR
} mq_module_kind;

/* What a module does in its layer. */
typedef enum mq_role {
    MQ_ROLE_ATTENTION, MQ_ROLE_Q, MQ_ROLE_K, MQ_ROLE_V, MQ_ROLE_O, MQ_ROLE_QKV, MQ_ROLE_Q_NORM, MQ_ROLE_K_NORM,
    MQ_ROLE_Q_A, MQ_ROLE_Q_B, MQ_ROLE_KV_A, MQ_ROLE_KV_B, MQ_ROLE_Q_A_NORM, MQ_ROLE_KV_A_NORM,
    MQ_ROLE_SINKS, MQ_ROLE_LINEAR_ATTENTION, MQ_ROLE_LINEAR_MLP, MQ_ROLE_CORRECTION, MQ_ROLE_UNIT_NORM,
    MQ_ROLE_GATE, MQ_ROLE_UP, MQ_ROLE_DOWN, MQ_ROLE_GATE_UP, MQ_ROLE_ROUTER, MQ_ROLE_EXPERTS,
    MQ_ROLE_SHARED_GATE, MQ_ROLE_SHARED_UP, MQ_ROLE_SHARED_DOWN, MQ_ROLE_SHARED_ROUTER,
    MQ_ROLE_INPUT_NORM,         /* of what attention reads */
    MQ_ROLE_POST_NORM,          /* of what MLP or experts read */
    MQ_ROLE_ATTENTION_NORM,     /* of what attention adds */
    MQ_ROLE_MLP_NORM,           /* of what MLP or experts add */
    MQ_ROLE_EMBED, MQ_ROLE_FINAL_NORM, MQ_ROLE_HEAD, MQ_ROLE_COUNT
} mq_role;

typedef enum mq_dim {
    MQ_DIM_NONE,
    MQ_DIM_ONE,
    MQ_DIM_HIDDEN,
    MQ_DIM_INNER,
    MQ_DIM_INNER_TWICE,
    MQ_DIM_Q,
    MQ_DIM_KV,
    MQ_DIM_V,
    MQ_DIM_O,         /* what attention puts out */
    MQ_DIM_QKV,
    MQ_DIM_Q_LORA,
    MQ_DIM_KV_LORA,
    MQ_DIM_KV_A,      /* kv_lora_rank and the part of keys that is turned */
    MQ_DIM_KV_B,
    MQ_DIM_HEADS,
    MQ_DIM_HEAD,
    MQ_DIM_KV_HEADS,
    MQ_DIM_EXPERTS,   /* how many there are */
    MQ_DIM_EXPERT,    /* intermediate size of one */
    MQ_DIM_SHARED     /* intermediate size of the one that all tokens have */
} mq_dim;

typedef enum mq_condition {
    MQ_IF_ALWAYS,
    MQ_IF_NEVER,
    MQ_IF_FUSED,
    MQ_IF_UNFUSED,
    MQ_IF_ATTENTION,         /* the layer has one */
    MQ_IF_LINEAR_ATTENTION,  /* it has a linear in its place */
    MQ_IF_LINEAR_MLP,
    MQ_IF_LATENT,
    MQ_IF_LATENT_Q,          /* queries too come of a narrow vector */
    MQ_IF_LATENT_PLAIN_Q,
    MQ_IF_LATENT_BIAS,
    MQ_IF_SINKS,
    MQ_IF_QKV_BIAS,
    MQ_IF_O_BIAS,
    MQ_IF_MLP_BIAS,
    MQ_IF_QK_NORM,
    MQ_IF_WIDE_QK_NORM,
    MQ_IF_PRE_NORMS,
    MQ_IF_POST_NORMS,
    MQ_IF_MLP_NORM,          /* one of what the second half reads, and none of what the first adds */
    MQ_IF_BOTH_NORMS,
    MQ_IF_DENSE,             /* the layer has an MLP */
    MQ_IF_DENSE_FUSED,
    MQ_IF_DENSE_UNFUSED,
    MQ_IF_DENSE_FEED_FORWARD, /* it has, named as in Llama 4 */
    MQ_IF_MOE,               /* the layer has experts */
    MQ_IF_MOE_MLP,           /* it has, named as in Qwen */
    MQ_IF_MOE_GATE,          /* ... and so is their router */
    MQ_IF_MOE_ROUTER,        /* ... but not their router (gpt-oss) */
    MQ_IF_MOE_BLOCK_SPARSE,  /* it has, named as in Mixtral */
    MQ_IF_MOE_FEED_FORWARD,  /* it has, named as in Llama 4 */
    MQ_IF_MOE_STACKS,        /* it has, named as in Granite */
    MQ_IF_EXPERT_BIAS,
    MQ_IF_CORRECTED,
    MQ_IF_SHARED_EXPERTS,    /* it has, and one that all tokens have */
    MQ_IF_SHARED_GATED       /* ... behind a gate */
} mq_condition;

/* name and site may hold one #, which stands for the number of an expert. */
typedef struct mq_layer_module {
    mq_role role;
    mq_module_kind kind;
    const char *name, *site;
    mq_dim rows, cols;
    mq_condition present, bias;
} mq_layer_module;

/* DeepSeek's inner norms have their own, whatever the config says. */
MQ_INLINE double mq_norm_eps(const mq_config *config, mq_role role)
{
    return role == MQ_ROLE_Q_A_NORM || role == MQ_ROLE_KV_A_NORM ? 1e-6 : config->rms_norm_eps;
}

/* What is computed in the model's own precision, and is no place for a quantizer. */
MQ_INLINE int mq_role_is_router(mq_role role)
{
    return role == MQ_ROLE_ROUTER || role == MQ_ROLE_SHARED_ROUTER;
}

const mq_family *mq_families(size_t *count);
const mq_family *mq_family_find(const char *name);   /* NULL if there is none */
const mq_layer_module *mq_layer_modules(size_t *count);
const char *mq_module_kind_name(mq_module_kind kind);
const char *mq_family_flag_name(unsigned flag);      /* of one bit; NULL beyond the last */

/* kind: of the layer that it is about; NULL: as large as any layer's. */
int64_t mq_dim_of(const mq_config *config, const mq_layer_kind *kind, mq_dim dim);
int mq_condition_holds(const mq_family *family, const mq_config *config, const mq_layer_kind *kind,
                       mq_condition condition);

#endif
