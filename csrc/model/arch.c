#include "model/arch.h"

#include <string.h>

static const mq_family families[] = {
#define MQ_FAMILY(name, models, oracle, model_types, architectures, flags) \
    {name, models, oracle, model_types, architectures, flags},
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
        "no_pre_norms", "norm_plus_one", "fused", "shared_expert", "shared_gated", "latent", "corrected", "blocks",
        "sinks", "biased_experts", "feed_forward", "shared_inputs", "expert_stacks",
    };
    for (size_t i = 0; i < MQ_COUNT(names); i++)
        if (flag == 1u << i) return names[i];
    return NULL;
}

int64_t mq_dim_of(const mq_config *config, const mq_layer_kind *kind, mq_dim dim)
{
    const int64_t heads = config->num_attention_heads, head = config->head_dim, value = config->value_head_dim;
    const int64_t kv_heads = kind != NULL && kind->kv_heads > 0 ? kind->kv_heads : config->num_key_value_heads;
    const int64_t inner = kind != NULL && kind->inner > 0 ? kind->inner : config->intermediate_size;
    switch (dim) {
    case MQ_DIM_ONE: return 1;
    case MQ_DIM_HIDDEN: return config->hidden_size;
    case MQ_DIM_INNER: return inner;
    case MQ_DIM_INNER_TWICE: return 2 * inner;
    case MQ_DIM_Q: return heads * head;
    case MQ_DIM_KV: return kv_heads * head;
    case MQ_DIM_V: return kv_heads * value;
    case MQ_DIM_O: return heads * value;
    case MQ_DIM_QKV: return (heads + kv_heads) * head + kv_heads * value;
    case MQ_DIM_Q_LORA: return config->q_lora_rank;
    case MQ_DIM_KV_LORA: return config->kv_lora_rank;
    case MQ_DIM_KV_A: return config->kv_lora_rank + config->qk_rope_head_dim;
    case MQ_DIM_KV_B: return heads * (head - config->qk_rope_head_dim + value);
    case MQ_DIM_HEADS: return heads;
    case MQ_DIM_HEAD: return head;
    case MQ_DIM_KV_HEADS: return kv_heads;
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

/* Of the attention half. */
static int attention_holds(const mq_family *family, const mq_config *config, const mq_layer_kind *kind,
                           mq_condition condition)
{
    const int full = kind->attention == MQ_BLOCK_FULL, latent = full && has(family, MQ_FAMILY_LATENT);
    const int fused = full && has(family, MQ_FAMILY_FUSED);
    const int biased = has(family, MQ_FAMILY_BIAS_KEYS) && config->attention_bias;
    switch (condition) {
    case MQ_IF_FUSED: return fused;
    case MQ_IF_UNFUSED: return full && !fused && !latent;
    case MQ_IF_ATTENTION: return full;
    case MQ_IF_LINEAR_ATTENTION: return kind->attention == MQ_BLOCK_LINEAR;
    case MQ_IF_LATENT: return latent;
    case MQ_IF_LATENT_Q: return latent && config->q_lora_rank > 0;
    case MQ_IF_LATENT_PLAIN_Q: return latent && config->q_lora_rank == 0;
    case MQ_IF_LATENT_BIAS: return latent && biased;
    case MQ_IF_SINKS: return full && has(family, MQ_FAMILY_SINKS);
    case MQ_IF_QKV_BIAS: return (has(family, MQ_FAMILY_QKV_BIAS) && config->qkv_bias) || biased;
    case MQ_IF_O_BIAS: return biased;
    case MQ_IF_QK_NORM: return full && has(family, MQ_FAMILY_QK_NORM);
    case MQ_IF_WIDE_QK_NORM: return full && has(family, MQ_FAMILY_WIDE_QK_NORM);
    default: return 0;
    }
}

/* Of the norms, which stand before and behind both. */
static int norm_holds(const mq_family *family, const mq_layer_kind *kind, mq_condition condition)
{
    const int before = !has(family, MQ_FAMILY_NO_PRE_NORMS), behind = has(family, MQ_FAMILY_POST_NORMS);
    switch (condition) {
    case MQ_IF_PRE_NORMS: return before && kind->attention != MQ_BLOCK_NONE;
    case MQ_IF_POST_NORMS: return behind;
    case MQ_IF_MLP_NORM: return !behind && kind->mlp != MQ_BLOCK_NONE;
    case MQ_IF_BOTH_NORMS: return before && behind;
    default: return 0;
    }
}

/* Of MLP and experts. */
static int mlp_holds(const mq_family *family, const mq_config *config, const mq_layer_kind *kind,
                     mq_condition condition)
{
    const int moe = kind->experts, dense = !moe && kind->mlp == MQ_BLOCK_FULL, fused = has(family, MQ_FAMILY_FUSED);
    const int block_sparse = has(family, MQ_FAMILY_BLOCK_SPARSE), forward = has(family, MQ_FAMILY_FEED_FORWARD);
    const int shared = has(family, MQ_FAMILY_SHARED_EXPERT), gated = has(family, MQ_FAMILY_SHARED_GATED);
    const int biased = has(family, MQ_FAMILY_BIASED_EXPERTS), stacks = has(family, MQ_FAMILY_EXPERT_STACKS);
    switch (condition) {
    case MQ_IF_MLP_BIAS: return has(family, MQ_FAMILY_BIAS_KEYS) && config->mlp_bias != 0;
    case MQ_IF_LINEAR_MLP: return kind->mlp == MQ_BLOCK_LINEAR;
    case MQ_IF_DENSE: return dense && !forward;
    case MQ_IF_DENSE_FUSED: return dense && fused;
    case MQ_IF_DENSE_UNFUSED: return dense && !fused && !forward;
    case MQ_IF_DENSE_FEED_FORWARD: return dense && forward;
    case MQ_IF_MOE: return moe && !forward && !stacks;
    case MQ_IF_MOE_MLP: return moe && !block_sparse && !forward && !stacks;
    case MQ_IF_MOE_GATE: return moe && !block_sparse && !forward && !stacks && !biased;
    case MQ_IF_MOE_ROUTER: return moe && biased;
    case MQ_IF_MOE_BLOCK_SPARSE: return moe && block_sparse;
    case MQ_IF_MOE_FEED_FORWARD: return moe && forward;
    case MQ_IF_MOE_STACKS: return moe && stacks;
    case MQ_IF_EXPERT_BIAS: return biased;
    case MQ_IF_CORRECTED: return moe && has(family, MQ_FAMILY_CORRECTED);
    case MQ_IF_SHARED_EXPERTS: return moe && shared && !gated && !forward && config->shared_intermediate_size > 0;
    case MQ_IF_SHARED_GATED: return moe && gated;
    default: return 0;
    }
}

int mq_condition_holds(const mq_family *family, const mq_config *config, const mq_layer_kind *kind,
                       mq_condition condition)
{
    return condition == MQ_IF_ALWAYS || attention_holds(family, config, kind, condition) ||
           norm_holds(family, kind, condition) || mlp_holds(family, config, kind, condition);
}
