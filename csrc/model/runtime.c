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

static void add_outer(mq_runtime *runtime, mq_role role, mq_module_kind kind, const char *name, int64_t rows,
                      int64_t cols)
{
    mq_module *module = &runtime->modules[runtime->module_count++];
    *module = (mq_module){.role = role, .kind = kind, .layer = -1, .shape = {rows, cols}, .ndim = cols > 0 ? 2 : 1};
    set_name(module->name, "", name, "");
    set_name(module->weight, "", name, ".weight");
}

static void add_layer_module(mq_runtime *runtime, int64_t index, const mq_layer_module *row)
{
    const mq_config *config = &runtime->config;
    mq_module *module = &runtime->modules[runtime->module_count++];
    char prefix[32];
    snprintf(prefix, sizeof prefix, "model.layers.%d.", (int)index);
    *module = (mq_module){
        .role = row->role, .kind = row->kind, .layer = index, .ndim = row->cols == MQ_DIM_NONE ? 1 : 2,
        .shape = {mq_dim_of(config, row->rows), mq_dim_of(config, row->cols)},
    };
    set_name(module->name, prefix, row->name, "");
    if (*row->site) set_name(module->site, prefix, row->site, "");
    if (row->kind != MQ_MODULE_ATTENTION) set_name(module->weight, prefix, row->name, ".weight");
    if (mq_condition_holds(runtime->family, config, row->bias)) set_name(module->bias, prefix, row->name, ".bias");
}

static int add_modules(mq_runtime *runtime, mq_error *err)
{
    const mq_config *config = &runtime->config;
    size_t rows, total;
    const mq_layer_module *table = mq_layer_modules(&rows);
    total = (size_t)config->num_hidden_layers * rows + 3;
    runtime->modules = mq_alloc_array(total, sizeof *runtime->modules);
    runtime->by_name = mq_alloc_array(total, sizeof *runtime->by_name);
    runtime->layer_start = mq_alloc_array((size_t)config->num_hidden_layers + 1, sizeof *runtime->layer_start);
    if (runtime->modules == NULL || runtime->by_name == NULL || runtime->layer_start == NULL)
        return mq_fail_memory(err, "the list of modules", total * sizeof *runtime->modules);
    add_outer(runtime, MQ_ROLE_EMBED, MQ_MODULE_EMBEDDING, "model.embed_tokens", config->vocab_size,
              config->hidden_size);
    for (int64_t i = 0; i < config->num_hidden_layers; i++) {
        runtime->layer_start[i] = runtime->module_count;
        for (size_t j = 0; j < rows; j++)
            if (mq_condition_holds(runtime->family, config, table[j].present)) add_layer_module(runtime, i, &table[j]);
    }
    runtime->layer_start[config->num_hidden_layers] = runtime->module_count;
    add_outer(runtime, MQ_ROLE_FINAL_NORM, MQ_MODULE_NORM, "model.norm", config->hidden_size, 0);
    add_outer(runtime, MQ_ROLE_HEAD, MQ_MODULE_LINEAR, "lm_head", config->vocab_size, config->hidden_size);
    mq_module *head = &runtime->modules[runtime->module_count - 1];
    set_name(head->site, "", "lm_head.input", "");
    if (config->tie_word_embeddings) set_name(head->weight, "", runtime->modules[0].weight, "");
    return MQ_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const mq_module *const *)a)->name, (*(const mq_module *const *)b)->name);
}

/* Input points of linears with one site string get one number; every other point has its own. */
static int site_of(const mq_runtime *runtime, const mq_module *module)
{
    const mq_module *other = &runtime->modules[runtime->layer_start[module->layer]];
    while (strcmp(other->site, module->site) != 0) other++;
    return (int)other->role;
}

static void bind_layers(mq_runtime *runtime, const int64_t *windows)
{
    for (size_t i = 0; i < runtime->module_count; i++) {
        const mq_module *module = &runtime->modules[i];
        runtime->by_name[i] = module;
        if (module->layer < 0) continue;
        mq_layer *layer = &runtime->layers[module->layer];
        layer->window = windows ? windows[module->layer] : runtime->config.sliding_window;
        if (module->kind == MQ_MODULE_ATTENTION) layer->attention_name = module->name;
        if (module->kind != MQ_MODULE_LINEAR) continue;
        layer->linears[module->role] = (mq_linear){
            .rows = module->shape[0], .cols = module->shape[1], .name = module->name,
            .input.site = site_of(runtime, module), .output.site = MQ_ROLE_COUNT + (int)module->role,
        };
    }
    for (int64_t i = 0; i < runtime->config.num_hidden_layers; i++) {
        mq_layer *layer = &runtime->layers[i];
        layer->q.site = 2 * MQ_ROLE_COUNT;
        layer->k.site = 2 * MQ_ROLE_COUNT + 1;
        layer->v.site = 2 * MQ_ROLE_COUNT + 2;
    }
    qsort(runtime->by_name, runtime->module_count, sizeof *runtime->by_name, by_name);
}

int mq_runtime_init(mq_runtime *runtime, const mq_family *family, const mq_config *config, mq_dtype dtype,
                    const int64_t *windows, mq_error *err)
{
    size_t layers = (size_t)config->num_hidden_layers;
    memset(runtime, 0, sizeof *runtime);
    runtime->family = family;
    runtime->config = *config;
    runtime->dtype = dtype;
    runtime->gemm = dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    int rc = add_modules(runtime, err);
    if (rc != MQ_OK) goto done;
    runtime->layers = mq_alloc_zeroed(layers * sizeof *runtime->layers);
    if (runtime->layers == NULL) rc = mq_fail_memory(err, "the layers", layers * sizeof *runtime->layers);
    else bind_layers(runtime, windows);
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
    runtime->layer_start = NULL;
    runtime->layers = NULL;
    runtime->by_name = NULL;
    runtime->modules = NULL;
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
    if (module->kind == MQ_MODULE_LINEAR) {
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

const mq_module *mq_runtime_outer(const mq_runtime *runtime, mq_role role)
{
    for (size_t i = 0; i < runtime->module_count; i++)
        if (runtime->modules[i].role == role) return &runtime->modules[i];
    return NULL;
}

const mq_tensor *mq_find_tensor(const mq_named_tensor *tensors, size_t count, const char *name, const int64_t *shape,
                                int ndim, mq_error *err)
{
    char found[160], wanted[160];
    const mq_tensor expected = mq_tensor_make(NULL, MQ_F32, ndim, shape);
    size_t at = 0;
    while (at < count && strcmp(tensors[at].name, name) != 0) at++;
    if (at == count) {
        mq_fail(err, MQ_ERR_VALUE, "tensor %s is missing", name);
        return NULL;
    }
    const mq_tensor *tensor = &tensors[at].tensor;
    int same = tensor->ndim == ndim && memcmp(tensor->shape, shape, (size_t)ndim * sizeof *shape) == 0;
    if (same && mq_tensor_is_float(tensor)) return tensor;
    mq_fail(err, same ? MQ_ERR_TYPE : MQ_ERR_VALUE, "tensor %s is %s, expected %s, bfloat16 or float16", name,
            mq_tensor_describe(tensor, found, sizeof found), mq_tensor_describe(&expected, wanted, sizeof wanted));
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

static int load_module(mq_runtime *runtime, const mq_module *module, const mq_named_tensor *tensors, size_t count,
                       mq_error *err)
{
    mq_layer *layer = &runtime->layers[module->layer];
    mq_linear *linear = &layer->linears[module->role];
    const mq_tensor *weight = mq_find_tensor(tensors, count, module->weight, module->shape, module->ndim, err);
    if (weight == NULL) return err->code;
    if (module->kind == MQ_MODULE_NORM) {
        layer->norms[module->role] = mq_read_vector(weight, runtime->dtype, module->weight, err);
        return layer->norms[module->role] == NULL ? err->code : MQ_OK;
    }
    if (module->bias[0] != '\0') {
        const mq_tensor *bias = mq_find_tensor(tensors, count, module->bias, module->shape, 1, err);
        if (bias != NULL) linear->weight.bias = mq_read_vector(bias, runtime->dtype, module->bias, err);
        if (linear->weight.bias == NULL) return err->code;
    }
    return mq_linear_load(&linear->weight, weight, runtime->gemm, module->weight, err);
}

/* Every given tensor must be one that the layer has: a surplus one is a mistake that would go unnoticed. */
static int check_names(const mq_runtime *runtime, int64_t layer, const mq_named_tensor *tensors, size_t count,
                       mq_error *err)
{
    for (size_t i = 0; i < count; i++) {
        int known = 0;
        for (size_t j = runtime->layer_start[layer]; j < runtime->layer_start[layer + 1] && !known; j++) {
            const mq_module *module = &runtime->modules[j];
            known = strcmp(tensors[i].name, module->weight) == 0 || strcmp(tensors[i].name, module->bias) == 0;
        }
        if (!known) return mq_fail(err, MQ_ERR_VALUE, "%s is not a tensor of layer %d", tensors[i].name, (int)layer);
    }
    return MQ_OK;
}

int mq_runtime_load_layer(mq_runtime *runtime, int64_t index, const mq_named_tensor *tensors, size_t count,
                          mq_error *err)
{
    int rc = check_names(runtime, index, tensors, count, err);
    mq_runtime_drop_layer(runtime, index);
    for (size_t i = runtime->layer_start[index]; rc == MQ_OK && i < runtime->layer_start[index + 1]; i++) {
        const mq_module *module = &runtime->modules[i];
        if (module->weight[0] != '\0') rc = load_module(runtime, module, tensors, count, err);
    }
    if (rc != MQ_OK) mq_runtime_drop_layer(runtime, index);
    else runtime->layers[index].loaded = 1;
    return rc;
}

void mq_runtime_drop_layer(mq_runtime *runtime, int64_t index)
{
    mq_layer *layer = &runtime->layers[index];
    for (int role = 0; role < MQ_ROLE_COUNT; role++) {
        mq_linear_free(&layer->linears[role].weight);
        mq_free(layer->norms[role]);
        layer->norms[role] = NULL;
    }
    layer->loaded = 0;
}
