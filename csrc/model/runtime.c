#include "model/runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/alloc.h"
#include "kernels/row_ops.h"

/* Appends ".weight" and so on; names are bounded by the table's and by 4096 layers, far below MQ_NAME_SIZE. */
static void set_name(char *out, const char *prefix, const char *name, const char *suffix)
{
    snprintf(out, MQ_NAME_SIZE, "%s%s%s", prefix, name, suffix);
}

/* A language model inside another has names of its own. */
static const char *root_of(const mq_config *config)
{
    return config->name_root[0] != '\0' ? config->name_root : "model.";
}

static void add_outer(mq_runtime *runtime, mq_role role, mq_module_kind kind, const char *name, int64_t rows,
                      int64_t cols)
{
    mq_module *module = &runtime->modules[runtime->module_count++];
    *module = (mq_module){.role = role, .kind = kind, .layer = -1, .expert = -1, .shape = {rows, cols},
                          .ndim = cols > 0 ? 2 : 1};
    const char *root = role == MQ_ROLE_HEAD ? "" : root_of(&runtime->config);
    set_name(module->name, root, name, "");
    set_name(module->weight, root, name, ".weight");
}

/* prefix, then text with the number of the expert in the place of #, then suffix. */
static void set_expert_name(char *out, const char *prefix, const char *text, int64_t expert, const char *suffix)
{
    const char *mark = strchr(text, '#');
    if (mark == NULL) set_name(out, prefix, text, suffix);
    else snprintf(out, MQ_NAME_SIZE, "%s%.*s%d%s%s", prefix, (int)(mark - text), text, (int)expert, mark + 1, suffix);
}

static void add_layer_module(mq_runtime *runtime, int64_t index, const mq_layer_kind *kind, const mq_layer_module *row,
                             int64_t expert)
{
    const mq_config *config = &runtime->config;
    mq_module *module = &runtime->modules[runtime->module_count++];
    char prefix[MQ_NAME_ROOT + 24];
    snprintf(prefix, sizeof prefix, "%slayers.%d.", root_of(config), (int)index);
    *module = (mq_module){
        .role = row->role, .kind = row->kind, .layer = index, .expert = expert,
        .ndim = row->cols == MQ_DIM_NONE ? 1 : 2,
        .shape = {mq_dim_of(config, kind, row->rows), mq_dim_of(config, kind, row->cols)},
    };
    set_expert_name(module->name, prefix, row->name, expert, "");
    if (*row->site) set_expert_name(module->site, prefix, row->site, expert, "");
    if (row->kind != MQ_MODULE_ATTENTION && row->kind != MQ_MODULE_EXPERTS)
        set_expert_name(module->weight, prefix, row->name, expert, row->kind == MQ_MODULE_VECTOR ? "" : ".weight");
    if (mq_condition_holds(runtime->family, config, kind, row->bias))
        set_expert_name(module->bias, prefix, row->name, expert, ".bias");
}

static int is_expert(const mq_layer_module *row)
{
    return strchr(row->name, '#') != NULL;
}

static int has_experts(const mq_runtime *runtime, const mq_per_layer *layers, int64_t index)
{
    if (runtime->config.num_experts == 0 || !(runtime->family->flags & MQ_FAMILY_MOE)) return 0;
    return layers->experts == NULL || layers->experts[index] != 0;
}

static mq_layer_kind kind_of(const mq_runtime *runtime, const mq_per_layer *layers, int64_t index)
{
    return (mq_layer_kind){
        .experts = has_experts(runtime, layers, index),
        .attention = layers->attention ? (mq_block)layers->attention[index] : MQ_BLOCK_FULL,
        .mlp = layers->mlp ? (mq_block)layers->mlp[index] : MQ_BLOCK_FULL,
        .kv_heads = layers->kv_heads ? layers->kv_heads[index] : 0,
        .inner = layers->inner ? layers->inner[index] : 0,
    };
}

/* The rows of one layer, those of experts once for each expert. Only counts if there is no memory yet. */
static size_t add_layer(mq_runtime *runtime, int64_t index, const mq_per_layer *layers)
{
    const mq_layer_kind kind = kind_of(runtime, layers, index);
    size_t rows, count = 0;
    const mq_layer_module *table = mq_layer_modules(&rows);
    for (size_t i = 0, step; i < rows; i += step) {
        int64_t times = is_expert(&table[i]) ? runtime->config.num_experts : 1;
        step = is_expert(&table[i]) ? MQ_EXPERT_LINEARS : 1;
        if (!mq_condition_holds(runtime->family, &runtime->config, &kind, table[i].present)) continue;
        count += (size_t)times * step;
        for (int64_t expert = 0; runtime->modules != NULL && expert < times; expert++)
            for (size_t j = 0; j < step; j++)
                add_layer_module(runtime, index, &kind, &table[i + j], is_expert(&table[i]) ? expert : -1);
    }
    return count;
}

static int check_layer(const mq_config *config, const mq_per_layer *layers, int64_t index, mq_error *err)
{
    const int64_t kv_heads = layers->kv_heads ? layers->kv_heads[index] : 0;
    const int64_t inner = layers->inner ? layers->inner[index] : 0;
    if (kv_heads > config->num_key_value_heads || (kv_heads > 0 && config->num_attention_heads % kv_heads != 0) ||
        inner > config->intermediate_size)
        return mq_fail(err, MQ_ERR_VALUE,
                       "config: layer %lld has %lld key and value heads and an MLP of %lld, but the model %lld of %lld "
                       "heads, and %lld", (long long)index, (long long)kv_heads, (long long)inner,
                       (long long)config->num_key_value_heads, (long long)config->num_attention_heads,
                       (long long)config->intermediate_size);
    return MQ_OK;
}

static int add_modules(mq_runtime *runtime, const mq_per_layer *layers, mq_error *err)
{
    const mq_config *config = &runtime->config;
    size_t total = 3;
    for (int64_t i = 0; i < config->num_hidden_layers; i++)
        if (check_layer(config, layers, i, err) != MQ_OK) return err->code;
    for (int64_t i = 0; i < config->num_hidden_layers; i++)
        total += add_layer(runtime, i, layers);
    runtime->modules = mq_alloc_array(total, sizeof *runtime->modules);
    runtime->by_name = mq_alloc_array(total, sizeof *runtime->by_name);
    runtime->layer_start = mq_alloc_array((size_t)config->num_hidden_layers + 1, sizeof *runtime->layer_start);
    if (runtime->modules == NULL || runtime->by_name == NULL || runtime->layer_start == NULL)
        return mq_fail_memory(err, "the list of modules", total * sizeof *runtime->modules);
    add_outer(runtime, MQ_ROLE_EMBED, MQ_MODULE_EMBEDDING, "embed_tokens", config->vocab_size,
              config->hidden_size);
    for (int64_t i = 0; i < config->num_hidden_layers; i++) {
        runtime->layer_start[i] = runtime->module_count;
        add_layer(runtime, i, layers);
    }
    runtime->layer_start[config->num_hidden_layers] = runtime->module_count;
    add_outer(runtime, MQ_ROLE_FINAL_NORM, MQ_MODULE_NORM, "norm", config->hidden_size, 0);
    const char *head_name = config->name_head[0] != '\0' ? config->name_head : "lm_head";
    add_outer(runtime, MQ_ROLE_HEAD, MQ_MODULE_LINEAR, head_name, config->vocab_size, config->hidden_size);
    mq_module *head = &runtime->modules[runtime->module_count - 1];
    set_name(head->site, "", head_name, ".input");
    if (config->tie_word_embeddings) set_name(head->weight, "", runtime->modules[0].weight, "");
    return MQ_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const mq_module *const *)a)->name, (*(const mq_module *const *)b)->name);
}

static int output_site(const mq_module *module)
{
    return MQ_ROLE_COUNT + (int)module->role;
}

/* Input points of linears with one site string get one number; every other point has its own. */
static int site_of(const mq_runtime *runtime, const mq_module *module)
{
    const mq_module *other = &runtime->modules[runtime->layer_start[module->layer]];
    while (strcmp(other->site, module->site) != 0) other++;
    return (int)other->role;
}

/* Every expert has the same place, and the name that their quantizers share. */
static void bind_linear(mq_runtime *runtime, const mq_module *module)
{
    if (module->expert > 0) return;
    mq_layer *layer = &runtime->layers[module->layer];
    layer->linears[module->role] = (mq_linear){
        .rows = module->shape[0], .cols = module->shape[1], .name = module->name, .output.site = output_site(module),
        .input.site = module->kind == MQ_MODULE_LINEAR ? site_of(runtime, module) : output_site(module),
    };
}

static void bind_layer(mq_runtime *runtime, int64_t index, const mq_per_layer *per_layer)
{
    mq_layer *layer = &runtime->layers[index];
    layer->q.site = 2 * MQ_ROLE_COUNT;
    layer->k.site = 2 * MQ_ROLE_COUNT + 1;
    layer->v.site = 2 * MQ_ROLE_COUNT + 2;
    layer->window = per_layer->windows ? per_layer->windows[index] : runtime->config.sliding_window;
    layer->chunk = per_layer->chunks ? per_layer->chunks[index] : 0;
    layer->rope = per_layer->ropes ? (int)per_layer->ropes[index] : MQ_LAYER_ROPE;
    layer->kind = kind_of(runtime, per_layer, index);
    runtime->layer_ropes |= 1u << layer->rope;
}

static void bind_layers(mq_runtime *runtime, const mq_per_layer *per_layer)
{
    for (size_t i = 0; i < runtime->module_count; i++) {
        const mq_module *module = &runtime->modules[i];
        runtime->by_name[i] = module;
        if (module->layer < 0) continue;
        mq_layer *layer = &runtime->layers[module->layer];
        if (module->kind == MQ_MODULE_ATTENTION) layer->attention_name = module->name;
        if (module->kind == MQ_MODULE_EXPERTS) layer->experts = runtime->config.num_experts;
        if (module->kind == MQ_MODULE_LINEAR || module->kind == MQ_MODULE_ROUTER) bind_linear(runtime, module);
        if (module->kind == MQ_MODULE_NORM) layer->widths[module->role] = module->shape[0];
    }
    for (int64_t i = 0; i < runtime->config.num_hidden_layers; i++) bind_layer(runtime, i, per_layer);
    qsort(runtime->by_name, runtime->module_count, sizeof *runtime->by_name, by_name);
}

int mq_runtime_init(mq_runtime *runtime, const mq_family *family, const mq_config *config, mq_dtype dtype,
                    const mq_per_layer *per_layer, mq_error *err)
{
    size_t layers = (size_t)config->num_hidden_layers;
    memset(runtime, 0, sizeof *runtime);
    runtime->ahead.layer = -1;
    runtime->family = family;
    runtime->config = *config;
    runtime->dtype = dtype;
    runtime->gemm = dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    int rc = add_modules(runtime, per_layer, err);
    if (rc != MQ_OK) goto done;
    runtime->layers = mq_alloc_zeroed(layers * sizeof *runtime->layers);
    if (runtime->layers == NULL) rc = mq_fail_memory(err, "the layers", layers * sizeof *runtime->layers);
    else bind_layers(runtime, per_layer);
done:
    if (rc != MQ_OK) mq_runtime_free(runtime);
    return rc;
}

void mq_runtime_free(mq_runtime *runtime)
{
    for (int64_t i = 0; runtime->layers != NULL && i < runtime->config.num_hidden_layers; i++)
        mq_runtime_drop_layer(runtime, i);
    mq_free(runtime->layers);
    mq_free(runtime->by_name);
    mq_free(runtime->layer_start);
    mq_free(runtime->modules);
    mq_free(runtime->gathered);
    runtime->layer_start = NULL;
    runtime->layers = NULL;
    runtime->by_name = NULL;
    runtime->modules = NULL;
    runtime->gathered = NULL;
}

const mq_module *mq_runtime_module(const mq_runtime *runtime, const char *name, size_t length)
{
    size_t low = 0, high = runtime->module_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const char *here = runtime->by_name[middle]->name;
        int order = strncmp(here, name, length);
        if (order == 0 && here[length] == '\0') return runtime->by_name[middle];
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

static mq_point *point_of(mq_runtime *runtime, const mq_module *module, const char *what)
{
    if (module->role == MQ_ROLE_HEAD) return strcmp(what, "input_quantizer") == 0 ? &runtime->head_input : NULL;
    if (module->layer < 0) return NULL;
    mq_layer *layer = &runtime->layers[module->layer];
    if (module->kind == MQ_MODULE_EXPERTS) {
        if (strcmp(what, "gate_up_proj_input_quantizer") == 0) return &layer->linears[MQ_ROLE_GATE].input;
        if (strcmp(what, "down_proj_input_quantizer") == 0) return &layer->linears[MQ_ROLE_DOWN].input;
    }
    if (module->kind == MQ_MODULE_LINEAR && module->expert < 0) {
        if (strcmp(what, "input_quantizer") == 0) return &layer->linears[module->role].input;
        if (strcmp(what, "output_quantizer") == 0) return &layer->linears[module->role].output;
    }
    if (module->kind == MQ_MODULE_ATTENTION) {
        if (strcmp(what, "q_bmm_quantizer") == 0) return &layer->q;
        if (strcmp(what, "k_bmm_quantizer") == 0) return &layer->k;
        if (strcmp(what, "v_bmm_quantizer") == 0) return &layer->v;
    }
    return NULL;
}

mq_point *mq_runtime_point(mq_runtime *runtime, const char *name, int64_t *layer)
{
    const char *dot = strrchr(name, '.');
    if (dot == NULL) return NULL;
    const mq_module *module = mq_runtime_module(runtime, name, (size_t)(dot - name));
    if (module == NULL) return NULL;
    *layer = module->layer;
    return point_of(runtime, module, dot + 1);
}

mq_observer **mq_runtime_observer(mq_runtime *runtime, const mq_module *module)
{
    if (module->role == MQ_ROLE_HEAD) return &runtime->head_observer;
    if (module->layer < 0) return NULL;
    mq_layer *layer = &runtime->layers[module->layer];
    if (module->kind == MQ_MODULE_EXPERTS) return &layer->experts_observer;
    return module->kind == MQ_MODULE_LINEAR && module->expert < 0 ? &layer->linears[module->role].observer : NULL;
}

const mq_module *mq_runtime_outer(const mq_runtime *runtime, mq_role role)
{
    for (size_t i = 0; i < runtime->module_count; i++)
        if (runtime->modules[i].role == role) return &runtime->modules[i];
    return NULL;
}

static const mq_named_tensor *find(const mq_named_tensor *tensors, size_t count, const char *name,
                                   const mq_tensor *expected, mq_error *err)
{
    char found[160], wanted[160];
    size_t at = 0;
    while (at < count && strcmp(tensors[at].name, name) != 0) at++;
    if (at == count) {
        mq_fail(err, MQ_ERR_VALUE, "tensor %s is missing", name);
        return NULL;
    }
    const mq_tensor *tensor = &tensors[at].tensor;
    int same = tensor->ndim == expected->ndim &&
               memcmp(tensor->shape, expected->shape, (size_t)tensor->ndim * sizeof *tensor->shape) == 0;
    if (same && mq_tensor_is_float(tensor)) return &tensors[at];
    mq_fail(err, same ? MQ_ERR_TYPE : MQ_ERR_VALUE, "tensor %s is %s, expected %s, bfloat16 or float16", name,
            mq_tensor_describe(tensor, found, sizeof found), mq_tensor_describe(expected, wanted, sizeof wanted));
    return NULL;
}

const mq_named_tensor *mq_find_weight(const mq_named_tensor *tensors, size_t count, const mq_module *module,
                                      mq_error *err)
{
    const mq_tensor expected = mq_tensor_make(NULL, MQ_F32, module->ndim, module->shape);
    return find(tensors, count, module->weight, &expected, err);
}

const mq_tensor *mq_find_tensor(const mq_named_tensor *tensors, size_t count, const char *name, const int64_t *shape,
                                int ndim, mq_error *err)
{
    const mq_tensor expected = mq_tensor_make(NULL, MQ_F32, ndim, shape);
    const mq_named_tensor *found = find(tensors, count, name, &expected, err);
    if (found == NULL || found->stored == NULL) return found ? &found->tensor : NULL;
    mq_fail(err, MQ_ERR_TYPE, "tensor %s is given as codes and scales, which only products of a forward take: here, as "
            "on all of the way back, give it as numbers (_core.dequantize makes them of the parts)", name);
    return NULL;
}

float *mq_read_vector(const mq_tensor *tensor, mq_dtype dtype, const char *name, mq_error *err)
{
    int64_t n = tensor->shape[0];
    float *out = mq_alloc_array((size_t)n, sizeof *out + mq_dtype_size(dtype));
    if (out == NULL) {
        mq_fail_memory(err, name, (size_t)n * sizeof *out);
        return NULL;
    }
    void *rounded = out + n;
    mq_read_row(rounded, dtype, tensor, 0);
    mq_row_ops_of(dtype)->to_f32(out, rounded, n);
    if (mq_row_ops_of(MQ_F32)->amax(out, n) < 0x7f800000u) return out;
    mq_fail(err, MQ_ERR_VALUE, "%s contains NaN or an infinity", name);
    mq_free(out);
    return NULL;
}

float *mq_read_norm(const mq_runtime *runtime, const mq_tensor *tensor, const char *name, mq_error *err)
{
    float *weight = mq_read_vector(tensor, runtime->dtype, name, err);
    const int plus_one = (runtime->family->flags & MQ_FAMILY_NORM_PLUS_ONE) != 0;
    for (int64_t i = 0; weight != NULL && plus_one && i < tensor->shape[0]; i++) weight[i] += 1.0f;
    return weight;
}

static int load_module(mq_runtime *runtime, const mq_module *module, const mq_named_tensor *tensors, size_t count,
                       mq_error *err)
{
    mq_elsewhere *there = runtime->elsewhere;
    mq_layer *layer = &runtime->layers[module->layer];
    mq_linear *linear = &layer->linears[module->role];
    if (module->kind == MQ_MODULE_NORM || module->kind == MQ_MODULE_VECTOR) {
        const mq_tensor *vector = mq_find_tensor(tensors, count, module->weight, module->shape, module->ndim, err);
        if (vector != NULL)
            layer->norms[module->role] = module->kind == MQ_MODULE_NORM
                                             ? mq_read_norm(runtime, vector, module->weight, err)
                                             : mq_read_vector(vector, MQ_F32, module->weight, err);
        if (layer->norms[module->role] == NULL) return err->code;
        return there == NULL ? MQ_OK : there->load(there, runtime, module, NULL, NULL, layer->norms[module->role], err);
    }
    const mq_named_tensor *weight = mq_find_weight(tensors, count, module, err);
    if (weight == NULL) return err->code;
    if (module->bias[0] != '\0') {
        const mq_tensor *bias = mq_find_tensor(tensors, count, module->bias, module->shape, 1, err);
        if (bias != NULL) linear->weight.bias = mq_read_vector(bias, runtime->dtype, module->bias, err);
        if (linear->weight.bias == NULL) return err->code;
    }
    if (there != NULL)
        return there->load(there, runtime, module, &weight->tensor, weight->stored, linear->weight.bias, err);
    if (weight->stored != NULL)
        return mq_linear_load_stored(&linear->weight, weight->stored, runtime->gemm, module->weight, err);
    return mq_linear_load(&linear->weight, &weight->tensor, runtime->gemm, module->weight, err);
}

static int has_tensor(const mq_module *module, int64_t expert, const char *name)
{
    return module->expert == expert && (strcmp(name, module->weight) == 0 || strcmp(name, module->bias) == 0);
}

int mq_runtime_check_names(const mq_runtime *runtime, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                           size_t count, mq_error *err)
{
    for (size_t i = 0; i < count; i++) {
        int known = 0;
        for (size_t j = runtime->layer_start[layer]; j < runtime->layer_start[layer + 1] && !known; j++)
            known = has_tensor(&runtime->modules[j], expert, tensors[i].name);
        if (!known) return mq_fail(err, MQ_ERR_VALUE, "%s is not a tensor of layer %d", tensors[i].name, (int)layer);
    }
    return MQ_OK;
}

/* The weight of a norm that has none. */
static int add_unit_norm(const mq_runtime *runtime, mq_layer *layer, mq_error *err)
{
    const int64_t width = runtime->config.head_dim;
    float *ones = mq_alloc_array((size_t)width, sizeof *ones);
    if (ones == NULL) return mq_fail_memory(err, "a norm", (size_t)width * sizeof *ones);
    for (int64_t i = 0; i < width; i++) ones[i] = 1.0f;
    layer->norms[MQ_ROLE_UNIT_NORM] = ones;
    layer->widths[MQ_ROLE_UNIT_NORM] = width;
    return MQ_OK;
}

int mq_runtime_load_layer(mq_runtime *runtime, int64_t index, const mq_named_tensor *tensors, size_t count,
                          mq_error *err)
{
    mq_elsewhere *there = runtime->elsewhere;
    int rc = mq_runtime_check_names(runtime, index, -1, tensors, count, err);
    mq_runtime_drop_layer(runtime, index);
    if (rc == MQ_OK && there != NULL) rc = there->begin(there, runtime, index, -1, tensors, count, err);
    for (size_t i = runtime->layer_start[index]; rc == MQ_OK && i < runtime->layer_start[index + 1]; i++) {
        const mq_module *module = &runtime->modules[i];
        if (module->weight[0] != '\0' && module->expert < 0) rc = load_module(runtime, module, tensors, count, err);
    }
    if (rc == MQ_OK && runtime->config.qk_unit_norm) rc = add_unit_norm(runtime, &runtime->layers[index], err);
    if (rc != MQ_OK) mq_runtime_drop_layer(runtime, index);
    else runtime->layers[index].loaded = 1;
    return rc;
}

const mq_module *mq_runtime_expert(const mq_runtime *runtime, int64_t layer, int64_t expert)
{
    const mq_module *module = &runtime->modules[runtime->layer_start[layer]];
    while (module->expert < 0) module++;
    return module + expert * MQ_EXPERT_LINEARS;
}

int mq_runtime_load_expert(mq_runtime *runtime, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                           size_t count, mq_error *err)
{
    int rc = mq_runtime_check_names(runtime, layer, expert, tensors, count, err);
    const mq_module *module = mq_runtime_expert(runtime, layer, expert);
    mq_elsewhere *there = runtime->elsewhere;
    mq_runtime_drop_expert(runtime, layer);
    if (rc == MQ_OK && there != NULL) rc = there->begin(there, runtime, layer, expert, tensors, count, err);
    for (int i = 0; rc == MQ_OK && i < MQ_EXPERT_LINEARS; i++)
        rc = load_module(runtime, &module[i], tensors, count, err);
    if (rc != MQ_OK) mq_runtime_drop_expert(runtime, layer);
    return rc;
}

static mq_linear_weight *expert_weight(mq_runtime *runtime, int64_t layer, int index)
{
    static const mq_role roles[MQ_EXPERT_LINEARS] = {MQ_ROLE_GATE, MQ_ROLE_UP, MQ_ROLE_DOWN};
    return &runtime->layers[layer].linears[roles[index]].weight;
}

void mq_runtime_drop_expert(mq_runtime *runtime, int64_t layer)
{
    if (runtime->elsewhere != NULL) runtime->elsewhere->drop_expert(runtime->elsewhere);
    for (int i = 0; i < MQ_EXPERT_LINEARS; i++) mq_linear_free(expert_weight(runtime, layer, i));
}

void mq_runtime_take_expert(mq_runtime *runtime, int64_t layer, mq_linear_weight *weights)
{
    for (int i = 0; i < MQ_EXPERT_LINEARS; i++) weights[i] = *expert_weight(runtime, layer, i);
    mq_runtime_lend_expert(runtime, layer, NULL);
}

void mq_runtime_lend_expert(mq_runtime *runtime, int64_t layer, const mq_linear_weight *weights)
{
    for (int i = 0; i < MQ_EXPERT_LINEARS; i++)
        *expert_weight(runtime, layer, i) = weights ? weights[i] : (mq_linear_weight){0};
}

static void drop_low_rank(mq_linear *linear)
{
    mq_linear_free(&linear->down);
    mq_linear_free(&linear->up);
}

int mq_runtime_load_low_rank(mq_runtime *runtime, const mq_module *module, const mq_tensor *down, const mq_tensor *up,
                             mq_error *err)
{
    mq_linear *linear = &runtime->layers[module->layer].linears[module->role];
    const int64_t rank = down->ndim == 2 ? down->shape[0] : 0;
    char have[96], other[96];
    if (rank < 1 || up->ndim != 2 || up->shape[1] != rank || down->shape[1] != linear->cols ||
        up->shape[0] != linear->rows || !mq_tensor_is_float(down) || !mq_tensor_is_float(up))
        return mq_fail(err, MQ_ERR_VALUE, "%s: a branch of low rank is [rank, %lld] and [%lld, rank], got %s and %s",
                       module->name, (long long)linear->cols, (long long)linear->rows,
                       mq_tensor_describe(down, have, sizeof have), mq_tensor_describe(up, other, sizeof other));
    drop_low_rank(linear);
    if (runtime->elsewhere != NULL) {
        const int there = runtime->elsewhere->load_low_rank(runtime->elsewhere, module, down, up, err);
        if (there == MQ_OK) runtime->rank = MQ_MAX(runtime->rank, rank);
        return there;
    }
    int rc = mq_linear_load(&linear->down, down, runtime->gemm, module->name, err);
    if (rc == MQ_OK) rc = mq_linear_load(&linear->up, up, runtime->gemm, module->name, err);
    if (rc != MQ_OK) drop_low_rank(linear);
    else runtime->rank = MQ_MAX(runtime->rank, rank);
    return rc;
}

void mq_runtime_drop_layer(mq_runtime *runtime, int64_t index)
{
    mq_layer *layer = &runtime->layers[index];
    if (runtime->elsewhere != NULL) runtime->elsewhere->drop_layer(runtime->elsewhere, index);
    for (int role = 0; role < MQ_ROLE_COUNT; role++) {
        drop_low_rank(&layer->linears[role]);
        mq_linear_free(&layer->linears[role].weight);
        mq_free(layer->norms[role]);
        layer->norms[role] = NULL;
    }
    layer->loaded = 0;
}
