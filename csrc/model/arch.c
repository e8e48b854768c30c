#include "model/arch.h"

#include <string.h>

static const mq_family families[] = {
#define MQ_FAMILY(name, model_types, architectures, flags) {name, model_types, architectures, flags},
#include "model/archs.def"
};

static const mq_layer_module layer_modules[] = {
#define MQ_LAYER_MODULE(role, kind, name, site, rows, cols, present, bias) \
    {role, kind, name, site, MQ_DIM_##rows, MQ_DIM_##cols, MQ_IF_##present, MQ_IF_##bias},
#include "model/archs.def"
};

const mq_family *mq_families(size_t *count)
{
    *count = MQ_COUNT(families);
    return families;
}

const mq_family *mq_family_find(const char *name)
{
    for (size_t i = 0; i < MQ_COUNT(families); i++)
        if (strcmp(families[i].name, name) == 0) return &families[i];
    return NULL;
}

const mq_layer_module *mq_layer_modules(size_t *count)
{
    *count = MQ_COUNT(layer_modules);
    return layer_modules;
}

const char *mq_module_kind_name(mq_module_kind kind)
{
    static const char *const names[] = {"linear", "embedding", "norm", "attention", "router", "experts", "vector"};
    return names[kind];
}

const char *mq_family_flag_name(unsigned flag)
{
    static const char *const names[] = {
        "qkv_bias", "bias_keys", "qk_norm", "moe", "block_sparse", "router_f32", "wide_qk_norm", "post_norms",
        "no_pre_norms", "norm_plus_one", "fused", "shared_expert", "shared_gated",
    };
    for (size_t i = 0; i < MQ_COUNT(names); i++)
        if (flag == 1u << i) return names[i];
    return NULL;
}

int64_t mq_dim_of(const mq_config *config, mq_dim dim)
{
    const int64_t q = config->num_attention_heads * config->head_dim;
    const int64_t k = config->num_key_value_heads * config->head_dim;
    const int64_t v = config->num_key_value_heads * config->value_head_dim;
    switch (dim) {
    case MQ_DIM_ONE: return 1;
    case MQ_DIM_HIDDEN: return config->hidden_size;
    case MQ_DIM_INNER: return config->intermediate_size;
    case MQ_DIM_INNER_TWICE: return 2 * config->intermediate_size;
    case MQ_DIM_Q: return q;
    case MQ_DIM_KV: return k;
    case MQ_DIM_V: return v;
    case MQ_DIM_O: return config->num_attention_heads * config->value_head_dim;
    case MQ_DIM_QKV: return q + k + v;
    case MQ_DIM_HEAD: return config->head_dim;
    case MQ_DIM_KV_HEADS: return config->num_key_value_heads;
    case MQ_DIM_EXPERTS: return config->num_experts;
    case MQ_DIM_EXPERT: return config->moe_intermediate_size;
    case MQ_DIM_SHARED: return config->shared_intermediate_size;
    case MQ_DIM_NONE: break;
    }
    return 0;
}

static int has(const mq_family *family, unsigned flag)
{
    return (family->flags & flag) != 0;
}

int mq_condition_holds(const mq_family *family, const mq_config *config, int moe, mq_condition condition)
{
    const int by_key = has(family, MQ_FAMILY_BIAS_KEYS), block_sparse = has(family, MQ_FAMILY_BLOCK_SPARSE);
    const int fused = has(family, MQ_FAMILY_FUSED), post_norms = has(family, MQ_FAMILY_POST_NORMS);
    switch (condition) {
    case MQ_IF_ALWAYS: return 1;
    case MQ_IF_NEVER: return 0;
    case MQ_IF_FUSED: return fused;
    case MQ_IF_UNFUSED: return !fused;
    case MQ_IF_QKV_BIAS:
        return (has(family, MQ_FAMILY_QKV_BIAS) && config->qkv_bias) || (by_key && config->attention_bias);
    case MQ_IF_O_BIAS: return by_key && config->attention_bias != 0;
    case MQ_IF_MLP_BIAS: return by_key && config->mlp_bias != 0;
    case MQ_IF_QK_NORM: return has(family, MQ_FAMILY_QK_NORM);
    case MQ_IF_WIDE_QK_NORM: return has(family, MQ_FAMILY_WIDE_QK_NORM);
    case MQ_IF_PRE_NORMS: return !has(family, MQ_FAMILY_NO_PRE_NORMS);
    case MQ_IF_POST_NORMS: return post_norms;
    case MQ_IF_NO_POST_NORMS: return !post_norms;
    case MQ_IF_BOTH_NORMS: return post_norms && !has(family, MQ_FAMILY_NO_PRE_NORMS);
    case MQ_IF_DENSE: return !moe;
    case MQ_IF_DENSE_FUSED: return !moe && fused;
    case MQ_IF_DENSE_UNFUSED: return !moe && !fused;
    case MQ_IF_MOE: return moe;
    case MQ_IF_MOE_MLP: return moe && !block_sparse;
    case MQ_IF_MOE_BLOCK_SPARSE: return moe && block_sparse;
    case MQ_IF_SHARED_GATED: return moe && has(family, MQ_FAMILY_SHARED_GATED);
    }
    return 0;
}
