#include "model/config.h"

#include <math.h>
#include <string.h>

static const mq_config_key keys[] = {
#define MQ_CONFIG_INT(name, fallback) {#name, MQ_CONFIG_IS_INT, offsetof(mq_config, name), fallback, 0.0, NULL},
#define MQ_CONFIG_REAL(name, fallback) {#name, MQ_CONFIG_IS_REAL, offsetof(mq_config, name), 0, fallback, NULL},
#define MQ_CONFIG_NAME(name, fallback) {#name, MQ_CONFIG_IS_NAME, offsetof(mq_config, name), 0, 0.0, fallback},
#include "model/config.def"
#undef MQ_CONFIG_INT
#undef MQ_CONFIG_REAL
#undef MQ_CONFIG_NAME
};

/* The words of each MQ_CONFIG_NAME key. */
static const struct { const char *key, *word; int value; } words[] = {
    {"rope_type", "default", MQ_ROPE_DEFAULT},
    {"rope_type", "linear", MQ_ROPE_LINEAR},
    {"rope_type", "llama3", MQ_ROPE_LLAMA3},
    {"rope_type", "yarn", MQ_ROPE_YARN},
    {"rope_type", "longrope", MQ_ROPE_LONGROPE},
    {"rope_type", "dynamic", MQ_ROPE_DYNAMIC},
    {"hidden_act", "silu", MQ_ACT_SILU},
    {"hidden_act", "swish", MQ_ACT_SILU},
    {"hidden_act", "gelu_pytorch_tanh", MQ_ACT_GELU_TANH},
    {"hidden_act", "swiglu_clamped", MQ_ACT_SWIGLU_CLAMPED},
    {"routing", "softmax", MQ_ROUTING_SOFTMAX},
    {"routing", "sigmoid", MQ_ROUTING_SIGMOID},
};

const mq_config_key *mq_config_keys(size_t *count)
{
    *count = MQ_COUNT(keys);
    return keys;
}

void mq_config_set_int(mq_config *config, const mq_config_key *key, int64_t value)
{
    memcpy((char *)config + key->offset, &value, sizeof value);
}

void mq_config_set_real(mq_config *config, const mq_config_key *key, double value)
{
    memcpy((char *)config + key->offset, &value, sizeof value);
}

int mq_config_set_word(mq_config *config, const mq_config_key *key, const char *word, mq_error *err)
{
    for (size_t i = 0; i < MQ_COUNT(words); i++) {
        if (strcmp(words[i].key, key->name) != 0 || strcmp(words[i].word, word) != 0) continue;
        memcpy((char *)config + key->offset, &words[i].value, sizeof words[i].value);
        return MQ_OK;
    }
    return mq_fail(err, MQ_ERR_VALUE, "config: %s \"%.64s\" is not supported", key->name, word);
}

/* Bounds that keep every product of sizes far from overflow. */
static int check_range(const char *name, int64_t value, int64_t low, int64_t high, mq_error *err)
{
    if (value >= low && value <= high) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "config: %s is %lld, expected %lld to %lld", name, (long long)value,
                   (long long)low, (long long)high);
}

static int check_sizes(const mq_config *config, mq_error *err)
{
    const int64_t width = 1 << 24, positive = 1;
    int rc = check_range("hidden_size", config->hidden_size, positive, width, err);
    if (rc == MQ_OK) rc = check_range("intermediate_size", config->intermediate_size, positive, width, err);
    if (rc == MQ_OK) rc = check_range("num_hidden_layers", config->num_hidden_layers, 0, 4096, err);
    if (rc == MQ_OK) rc = check_range("num_attention_heads", config->num_attention_heads, positive, 65536, err);
    if (rc == MQ_OK) rc = check_range("num_key_value_heads", config->num_key_value_heads, positive, 65536, err);
    if (rc == MQ_OK) rc = check_range("head_dim", config->head_dim, 2, 4096, err);
    if (rc == MQ_OK) rc = check_range("value_head_dim", config->value_head_dim, positive, 4096, err);
    if (rc == MQ_OK) rc = check_range("q_lora_rank", config->q_lora_rank, 0, width, err);
    if (rc == MQ_OK) rc = check_range("kv_lora_rank", config->kv_lora_rank, 0, width, err);
    if (rc == MQ_OK) rc = check_range("qk_rope_head_dim", config->qk_rope_head_dim, 0, config->head_dim, err);
    if (rc == MQ_OK) rc = check_range("attention_floor", config->attention_floor, 0, INT32_MAX, err);
    if (rc == MQ_OK) rc = check_range("shared_intermediate_size", config->shared_intermediate_size, 0, width, err);
    if (rc == MQ_OK) rc = check_range("vocab_size", config->vocab_size, positive, width, err);
    if (rc == MQ_OK) rc = check_range("sliding_window", config->sliding_window, 0, INT32_MAX, err);
    return rc;
}

int64_t mq_config_rotary(const mq_config *config)
{
    if (config->qk_rope_head_dim > 0) return config->qk_rope_head_dim / 2 * 2;
    return (int64_t)((double)config->head_dim * config->partial_rotary_factor) / 2 * 2;
}

static int check_rope(const mq_config *config, mq_error *err)
{
    if (!(config->rope_theta > 0.0) || !(config->rope_factor > 0.0))
        return mq_fail(err, MQ_ERR_VALUE, "config: rope_theta %g and rope_factor %g must be positive",
                       config->rope_theta, config->rope_factor);
    if (!(config->partial_rotary_factor > 0.0) || config->partial_rotary_factor > 1.0)
        return mq_fail(err, MQ_ERR_VALUE, "config: partial_rotary_factor %g is not in (0, 1]",
                       config->partial_rotary_factor);
    if (config->rope_interleaved && mq_config_rotary(config) > 2 * MQ_ROPE_FACTORS)
        return mq_fail(err, MQ_ERR_VALUE, "config: rope_interleaved turns %d numbers of a head at most",
                       2 * MQ_ROPE_FACTORS);
    if (!(config->rope_local_theta > 0.0))
        return mq_fail(err, MQ_ERR_VALUE, "config: rope_local_theta %g must be positive", config->rope_local_theta);
    if ((config->rope_type == MQ_ROPE_YARN || config->rope_type == MQ_ROPE_LONGROPE ||
         config->rope_type == MQ_ROPE_DYNAMIC) && config->rope_original_max_position_embeddings <= 0)
        return mq_fail(err, MQ_ERR_VALUE, "config: this rope_type needs rope_original_max_position_embeddings > 0");
    if (config->rope_type == MQ_ROPE_LONGROPE && config->rope_factors != mq_config_rotary(config) / 2)
        return mq_fail(err, MQ_ERR_VALUE, "config: rope_type longrope needs %lld numbers in rope_short_factor and "
                       "rope_long_factor, got %lld", (long long)(mq_config_rotary(config) / 2),
                       (long long)config->rope_factors);
    if (config->rope_type == MQ_ROPE_DYNAMIC &&
        (mq_config_rotary(config) < 4 || mq_config_rotary(config) > 2 * MQ_ROPE_FACTORS))
        return mq_fail(err, MQ_ERR_VALUE, "config: rope_type dynamic turns 4 to %d numbers of a head, got %lld",
                       2 * MQ_ROPE_FACTORS, (long long)mq_config_rotary(config));
    if (config->rope_type != MQ_ROPE_LLAMA3) return MQ_OK;
    if (config->rope_original_max_position_embeddings <= 0 || !(config->rope_low_freq_factor > 0.0) ||
        !(config->rope_high_freq_factor > config->rope_low_freq_factor))
        return mq_fail(err, MQ_ERR_VALUE,
                       "config: rope_type llama3 needs rope_original_max_position_embeddings > 0 (%lld) and "
                       "0 < rope_low_freq_factor < rope_high_freq_factor (%g, %g)",
                       (long long)config->rope_original_max_position_embeddings, config->rope_low_freq_factor,
                       config->rope_high_freq_factor);
    return MQ_OK;
}

static int check_experts(const mq_config *config, mq_error *err)
{
    int rc = check_range("num_experts", config->num_experts, 0, MQ_MAX_EXPERTS, err);
    if (rc != MQ_OK || config->num_experts == 0) return rc;
    rc = check_range("num_experts_per_tok", config->num_experts_per_tok, 1, config->num_experts, err);
    if (rc == MQ_OK) rc = check_range("moe_intermediate_size", config->moe_intermediate_size, 1, 1 << 24, err);
    if (rc != MQ_OK || config->expert_groups == 0) return rc;
    rc = check_range("expert_groups", config->expert_groups, 1, config->num_experts, err);
    if (rc == MQ_OK) rc = check_range("expert_groups_kept", config->expert_groups_kept, 1, config->expert_groups, err);
    if (rc == MQ_OK) rc = check_range("expert_groups_best", config->expert_groups_best, 1, 2, err);
    if (rc != MQ_OK) return rc;
    if (config->num_experts % config->expert_groups != 0)
        return mq_fail(err, MQ_ERR_VALUE, "config: num_experts %lld is not a multiple of expert_groups %lld",
                       (long long)config->num_experts, (long long)config->expert_groups);
    const int64_t kept = config->num_experts / config->expert_groups * config->expert_groups_kept;
    if (config->num_experts_per_tok > kept)
        return mq_fail(err, MQ_ERR_VALUE, "config: num_experts_per_tok %lld is more than the %lld experts of "
                       "expert_groups_kept %lld", (long long)config->num_experts_per_tok, (long long)kept,
                       (long long)config->expert_groups_kept);
    return MQ_OK;
}

int mq_config_finish(mq_config *config, mq_error *err)
{
    for (size_t i = 0; i < MQ_COUNT(keys); i++) {
        int64_t value;
        if (keys[i].type != MQ_CONFIG_IS_INT) continue;
        memcpy(&value, (const char *)config + keys[i].offset, sizeof value);
        if (value == MQ_REQUIRED) return mq_fail(err, MQ_ERR_VALUE, "config: %s is missing", keys[i].name);
    }
    if (config->num_key_value_heads == 0) config->num_key_value_heads = config->num_attention_heads;
    if (config->head_dim == 0 && config->num_attention_heads > 0)
        config->head_dim = config->hidden_size / config->num_attention_heads;
    if (config->value_head_dim == 0) config->value_head_dim = config->head_dim;
    if (config->attention_multiplier == 0.0 && config->head_dim > 0)
        config->attention_multiplier = 1.0 / sqrt((double)config->head_dim);
    if (config->moe_intermediate_size == 0) config->moe_intermediate_size = config->intermediate_size;
    int rc = check_sizes(config, err);
    if (rc == MQ_OK) rc = check_rope(config, err);
    if (rc == MQ_OK) rc = check_experts(config, err);
    if (rc != MQ_OK) return rc;
    if (config->num_attention_heads % config->num_key_value_heads != 0)
        return mq_fail(err, MQ_ERR_VALUE,
                       "config: num_attention_heads %lld is not a multiple of num_key_value_heads %lld",
                       (long long)config->num_attention_heads, (long long)config->num_key_value_heads);
    if (config->head_dim % 2 != 0)
        return mq_fail(err, MQ_ERR_VALUE, "config: head_dim %lld is odd", (long long)config->head_dim);
    return MQ_OK;
}
