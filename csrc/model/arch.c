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
    static const char *const names[] = {"linear", "embedding", "norm", "attention", "router", "experts"};
    return names[kind];
}

const char *mq_family_flag_name(unsigned flag)
{
    switch (flag) {
    case MQ_FAMILY_QKV_BIAS: return "qkv_bias";
    case MQ_FAMILY_BIAS_KEYS: return "bias_keys";
    case MQ_FAMILY_QK_NORM: return "qk_norm";
    case MQ_FAMILY_MOE: return "moe";
    case MQ_FAMILY_BLOCK_SPARSE: return "block_sparse";
    case MQ_FAMILY_ROUTER_F32: return "router_f32";
    default: return NULL;
    }
}

int64_t mq_dim_of(const mq_config *config, mq_dim dim)
{
    switch (dim) {
    case MQ_DIM_HIDDEN: return config->hidden_size;
    case MQ_DIM_INNER: return config->intermediate_size;
    case MQ_DIM_Q: return config->num_attention_heads * config->head_dim;
    case MQ_DIM_KV: return config->num_key_value_heads * config->head_dim;
    case MQ_DIM_HEAD: return config->head_dim;
    case MQ_DIM_KV_HEADS: return config->num_key_value_heads;
    case MQ_DIM_EXPERTS: return config->num_experts;
    case MQ_DIM_EXPERT: return config->moe_intermediate_size;
    case MQ_DIM_NONE: break;
    }
    return 0;
}

int mq_condition_holds(const mq_family *family, const mq_config *config, int moe, mq_condition condition)
{
    int by_key = (family->flags & MQ_FAMILY_BIAS_KEYS) != 0;
    int block_sparse = (family->flags & MQ_FAMILY_BLOCK_SPARSE) != 0;
    switch (condition) {
    case MQ_IF_ALWAYS: return 1;
    case MQ_IF_NEVER: return 0;
    case MQ_IF_QKV_BIAS: return (family->flags & MQ_FAMILY_QKV_BIAS) != 0 || (by_key && config->attention_bias);
    case MQ_IF_O_BIAS: return by_key && config->attention_bias != 0;
    case MQ_IF_MLP_BIAS: return by_key && config->mlp_bias != 0;
    case MQ_IF_QK_NORM: return (family->flags & MQ_FAMILY_QK_NORM) != 0;
    case MQ_IF_DENSE: return !moe;
    case MQ_IF_MOE: return moe;
    case MQ_IF_MOE_MLP: return moe && !block_sparse;
    case MQ_IF_MOE_BLOCK_SPARSE: return moe && block_sparse;
    }
    return 0;
}
