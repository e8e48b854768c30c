/* Products of weights that stay codes. Where a device multiplies their format and that of the input (mq_cuda_path), the
 * input's quantizer is part of the product; elsewhere the input is rounded before, and the weight becomes numbers tile
 * by tile. */
#include "backend/device_pass.h"

/* ---- what quantizers are to products ---- */

static int says_blocks(const mq_quantizer *quantizer, mq_cuda_linear *linear)
{
    const mq_quant_spec *spec = &quantizer->spec;
    if (spec->scheme < 0 || quantizer->block_amax != NULL) return 0;
    const mq_scheme_row *scheme = mq_scheme_get((mq_scheme)spec->scheme);
    const int divides = scheme->second_divisor != 0.0f;
    if (spec->block_rows != 1 || spec->block_cols != scheme->block_cols) return 0;
    if (divides && spec->second_divisor != 0.0f && spec->second_divisor != scheme->second_divisor) return 0;
    linear->inputs = MQ_CUDA_INPUTS_SCHEME;
    linear->input_scheme = (mq_scheme)spec->scheme;
    return 1;
}

static int says_scaled(const mq_quantizer *quantizer, mq_cuda_linear *linear)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const int is_float = spec->kind == MQ_KIND_FLOAT && spec->element == MQ_FMT_FP8_E4M3;
    const int is_int = spec->kind == MQ_KIND_INT && spec->bits == 8 && !spec->narrow_range && !spec->is_unsigned;
    if (!is_float && !is_int) return 0;
    linear->input_kind = spec->kind;
    if (spec->block_rows == 0 && spec->block_cols == 0 && (spec->dynamic || quantizer->amax_count == 1)) {
        linear->inputs = MQ_CUDA_INPUTS_TENSOR;
        return 1;
    }
    if (spec->block_rows != 1 || !spec->dynamic) return 0;
    linear->inputs = spec->block_cols == 0 ? MQ_CUDA_INPUTS_TOKEN : MQ_CUDA_INPUTS_GROUP;
    return spec->block_cols == 0 || (spec->block_cols == 128 && is_float);
}

/* Whether what a quantizer rounds to can be said of a product's input; it is then. */
static int says(const mq_quantizer *quantizer, mq_cuda_linear *linear)
{
    if (quantizer == NULL || !quantizer->enabled || quantizer->bias != NULL) return 0;
    return quantizer->spec.scale != MQ_FMT_FP32 ? says_blocks(quantizer, linear) : says_scaled(quantizer, linear);
}

int mq_device_has_amax(const mq_quantizer *quantizer, const mq_cuda_linear *linear)
{
    if (quantizer->amax == NULL || linear->inputs == MQ_CUDA_INPUTS_TOKEN || linear->inputs == MQ_CUDA_INPUTS_GROUP)
        return 0;
    if (linear->inputs == MQ_CUDA_INPUTS_TENSOR) return !quantizer->spec.dynamic;
    return mq_scheme_get(linear->input_scheme)->second_divisor != 0.0f;
}

/* Numbers that were rounded to less than the activations' float32 are no codes times scales. */
int mq_device_is_narrow(const mq_device *device, mq_dtype dtype, const mq_device_linear *weights,
                        const mq_quantizer *quantizer, mq_cuda_linear *linear)
{
    *linear = weights->packed;
    if (dtype == MQ_F32 && linear->dtype != MQ_F32) return 0;
    if (!says(quantizer, linear)) return 0;
    const mq_cuda_path path = device->backend->linear_path(device->gemm, linear);
    if (path != weights->prepared_for) linear->prepared = NULL;
    return path != MQ_CUDA_PATH_DEQUANTIZE;
}

/* ---- products ---- */

int mq_device_run_packed(mq_device *device, const mq_cuda_linear_job *job, mq_error *err)
{
    mq_cuda_path taken = MQ_CUDA_PATH_DEQUANTIZE;
    const int rc = device->backend->linear_run(device->gemm, job, &taken, device->compute, err);
    if (rc == MQ_OK) device->products[taken]++;
    return rc;
}

static int run(mq_device_pass *pass, const mq_cuda_linear *linear, void *out, const void *in, const void *bias,
               int accumulate)
{
    const mq_cuda_linear_job job = {
        .linear = *linear, .in = mq_device_matrix(pass, (void *)(uintptr_t)in, linear->cols),
        .out = mq_device_matrix(pass, out, linear->rows), .bias = bias, .accumulate = accumulate,
        .workspace = pass->device->workspace,
    };
    return mq_device_run_packed(pass->device, &job, pass->err);
}

/* Quantized as part of the product; what comes before rounding is done here. */
static int run_narrow(mq_device_pass *pass, const mq_linear *at, const mq_device_linear *weights,
                      mq_cuda_linear *linear, void *out, const void *in, int accumulate)
{
    const mq_quantizer *quantizer = at->input.quantizer;
    int rc = MQ_OK;
    if (mq_quantizer_prepares(quantizer)) {
        rc = mq_device_quantize(pass, &at->input, pass->scratch->quantized, in, at->cols, MQ_QUANT_PREPARE);
        pass->applied = NULL;
        in = pass->scratch->quantized;
    }
    if (rc == MQ_OK && mq_device_has_amax(quantizer, linear))
        rc = mq_device_amax(pass, &at->input, &linear->input_amax);
    return rc == MQ_OK ? run(pass, linear, out, in, weights->bias, accumulate) : rc;
}

int mq_device_multiply(mq_device_pass *pass, const mq_linear *at, const mq_device_linear *weights, void *out,
                       const void *in, int accumulate)
{
    mq_cuda_linear linear;
    const mq_quantizer *quantizer = at->input.quantizer;
    const int packed = weights->packed.codes != NULL;
    if (packed && mq_device_is_narrow(pass->device, pass->context->dtype, weights, quantizer, &linear))
        return run_narrow(pass, at, weights, &linear, out, in, accumulate);
    const int rc = mq_device_quantized(pass, at, in, &in);
    if (rc != MQ_OK) return rc;
    if (packed) return run(pass, &weights->packed, out, in, weights->bias, accumulate);
    return mq_device_product(pass, out, in, &weights->weight, weights->bias, accumulate);
}

/* ---- for reports ---- */

int64_t mq_device_products(const mq_device *device, int path)
{
    return device->products[path];
}

const char *mq_device_path_name(int path)
{
    static const char *const names[MQ_CUDA_PATHS] = {
        [MQ_CUDA_PATH_NVFP4] = "nvfp4", [MQ_CUDA_PATH_MXFP8] = "mxfp8", [MQ_CUDA_PATH_FP8_BLOCK] = "fp8_block",
        [MQ_CUDA_PATH_FP8_OUTER] = "fp8_outer", [MQ_CUDA_PATH_FP8_TENSOR] = "fp8_tensor",
        [MQ_CUDA_PATH_FP8_SCALED] = "fp8_scaled", [MQ_CUDA_PATH_INT8] = "int8",
        [MQ_CUDA_PATH_DEQUANTIZE] = "dequantize",
    };
    return path < MQ_CUDA_PATHS ? names[path] : NULL;
}
