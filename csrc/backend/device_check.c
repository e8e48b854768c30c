/* What a device does not compute so far: families that need it are refused by name, before anything is loaded. */
#include "backend/device_parts.h"

typedef struct need {
    int is_there;
    const char *what;
} need;

static int has_role(const mq_runtime *runtime, mq_role role)
{
    int found = 0;
    for (size_t i = 0; i < runtime->module_count; i++) found |= runtime->modules[i].role == role;
    return found;
}

static int has_vectors(const mq_runtime *runtime)
{
    int found = 0;
    for (size_t i = 0; i < runtime->module_count; i++)
        found |= runtime->modules[i].kind == MQ_MODULE_VECTOR && runtime->modules[i].role != MQ_ROLE_CORRECTION;
    return found;
}

static int has_chunks(const mq_runtime *runtime)
{
    int found = 0;
    for (int64_t i = 0; i < runtime->config.num_hidden_layers; i++) found |= runtime->layers[i].chunk > 0;
    return found;
}

int mq_device_supports(const mq_runtime *runtime, mq_error *err)
{
    const mq_config *config = &runtime->config;
    const need needs[] = {
        {config->hidden_act != MQ_ACT_SILU, "activations other than SiLU"},
        {config->attn_logit_softcapping > 0.0, "soft caps of attention scores"},
        {config->residual_multiplier != 1.0, "a multiplier of what a layer adds"},
        {config->qk_rope_head_dim > 0 || config->rope_interleaved, "rope on a part of a head, or on neighbours"},
        {config->qk_unit_norm || config->attention_floor > 0, "norms and scales behind rope"},
        {config->rope_type == MQ_ROPE_LONGROPE, "longrope, which depends on a sequence's length"},
        {(runtime->layer_ropes & 1u << MQ_LAYER_LOCAL_ROPE) != 0, "a rope of its own in some layers"},
        {config->q_lora_rank > 0 || config->kv_lora_rank > 0, "latent attention"},
        {(runtime->family->flags & MQ_FAMILY_SHARED_INPUTS) != 0, "inputs of experts that are multiplied"},
        {has_role(runtime, MQ_ROLE_SHARED_DOWN), "an expert that all tokens share"},
        {has_vectors(runtime), "vectors beside linears and norms"},
        {has_chunks(runtime), "attention by chunks"},
        {config->head_dim > 256 || config->value_head_dim > 256, "heads of more than 256 numbers"},
    };
    for (size_t i = 0; i < MQ_COUNT(needs); i++)
        if (needs[i].is_there)
            return mq_fail(err, MQ_ERR_VALUE,
                           "%s models are computed on the CPU only so far: they have %s, which is not there on a GPU; "
                           "load this model without device='cuda'", runtime->family->name, needs[i].what);
    return MQ_OK;
}
