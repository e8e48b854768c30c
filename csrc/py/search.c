/* The searches of csrc/calib on arrays: AWQ's and SmoothQuant's scales, what ways to quantize a weight lose, the best
 * maxima, scales of FP4 blocks, GPTQ. */
#include "py/convert.h"
#include "py/ndarray.h"
#include "py/outputs.h"
#include "py/parts.h"
#include "py/type_gram_loss.h"
#include "py/type_quantizer.h"

#include <string.h>

#include "calib/awq.h"
#include "calib/factor.h"
#include "calib/gptq.h"
#include "calib/low_rank.h"
#include "calib/sweep.h"
#include "calib/trial.h"
#include "core/alloc.h"

/* Arguments that live as long as a call; each is released once. */
enum { MOST_KEPT = 8 };
typedef struct call {
    mq_state *state;
    PyObject *kept[MOST_KEPT];
    int count;
    PyObject *held;             /* a quantizer */
} call;

static void end_call(call *c)
{
    for (int i = 0; i < c->count; i++) Py_DECREF(c->kept[i]);
    if (c->held != NULL) mq_quantizer_release(c->held);
}

/* A float matrix of any dtype and strides. */
static int take_matrix(call *c, PyObject *object, const char *name, mq_tensor *out)
{
    PyObject *reference = NULL;
    char text[96];
    if (mq_view_object(c->state, object, name, out, &reference) < 0) return -1;
    if (reference != NULL) c->kept[c->count++] = reference;
    if (out->ndim == 2 && (int)out->dtype <= MQ_F16) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected a float32, bfloat16 or float16 matrix, got %s", name,
                 mq_tensor_describe(out, text, sizeof text));
    return -1;
}

/* float32, contiguous, with so many dimensions, the last of `last` entries unless that is negative. None: data NULL. */
static int take_floats(call *c, PyObject *object, const char *name, int ndim, int64_t last, mq_tensor *out)
{
    PyObject *reference = NULL;
    char text[96];
    *out = (mq_tensor){0};
    if (object == NULL || object == Py_None) return 0;
    if (mq_view_as(c->state, object, name, MQ_F32, out, &reference) < 0) return -1;
    if (reference != NULL) c->kept[c->count++] = reference;
    if (out->ndim == ndim && (last < 0 || out->shape[ndim - 1] == last)) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %d dimensions, the last of %lld, got %s", name, ndim, (long long)last,
                 mq_tensor_describe(out, text, sizeof text));
    return -1;
}

/* The same where there must be some. */
static int need_floats(call *c, PyObject *object, const char *name, int ndim, int64_t last, mq_tensor *out)
{
    if (object != Py_None) return take_floats(c, object, name, ndim, last, out);
    PyErr_Format(PyExc_TypeError, "%s: expected float32 numbers, got None", name);
    return -1;
}

static const mq_quantizer *take_quantizer(call *c, PyObject *object)
{
    const mq_quantizer *quantizer = mq_quantizer_hold(c->state, object);
    if (quantizer != NULL) c->held = object;
    return quantizer;
}

static PyObject *new_floats(mq_state *state, int ndim, const int64_t *shape, mq_tensor *view)
{
    return mq_new_array(state, MQ_F32, ndim, shape, view);
}

/* ---- scales of columns ---- */

PyDoc_STRVAR(awq_weight_scale_doc,
"awq_weight_scale(weight, block_size=0)\n--\n\n"
"float32 [in]: the mean over rows of |w| / the largest |w| of its block along the row (0: of its row), in weight's\n"
"dtype (AWQ, Lin et al. 2024; the reference's get_weight_scale). ValueError: no rows.");

static PyObject *awq_weight_scale(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "block_size", NULL};
    call c = {.state = mq_state_of(module)};
    PyObject *object, *result = NULL;
    long long block = 0;
    mq_tensor weight, view;
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|L", names, &object, &block)) return NULL;
    if (take_matrix(&c, object, "weight", &weight) < 0) goto done;
    if (block < 0) {
        PyErr_Format(PyExc_ValueError, "block_size: expected 0 or more, got %lld", block);
        goto done;
    }
    result = new_floats(c.state, 1, &weight.shape[1], &view);
    if (result == NULL) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_awq_weight_scale(&weight, block, "weight", view.data, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    end_call(&c);
    return result;
}

PyDoc_STRVAR(awq_scales_doc,
"awq_scales(activations, weights, alphas)\n--\n\n"
"float32 [alphas, in]: activations^alpha / weights^(1 - alpha), clamped to [1e-4, 1e4], over the root of the largest\n"
"times the smallest. activations: means of |x| [in]; weights: of awq_weight_scale. ValueError: NaN, infinity or less\n"
"than 0.");

static PyObject *awq_scales(PyObject *module, PyObject *args)
{
    call c = {.state = mq_state_of(module)};
    PyObject *objects[3], *result = NULL;
    mq_tensor activations, weights, alphas, view;
    mq_error err;
    int rc = MQ_OK;
    if (!PyArg_ParseTuple(args, "OOO:awq_scales", &objects[0], &objects[1], &objects[2])) return NULL;
    if (need_floats(&c, objects[0], "activations", 1, -1, &activations) < 0 ||
        need_floats(&c, objects[1], "weights", 1, activations.shape[0], &weights) < 0 ||
        need_floats(&c, objects[2], "alphas", 1, -1, &alphas) < 0)
        goto done;
    const int64_t shape[2] = {alphas.shape[0], activations.shape[0]};
    result = new_floats(c.state, 2, shape, &view);
    for (int64_t i = 0; result != NULL && rc == MQ_OK && i < shape[0]; i++)
        rc = mq_awq_scale(activations.data, weights.data, shape[1], ((const float *)alphas.data)[i],
                          (float *)view.data + i * shape[1], &err);
    result = mq_result(result, rc, &err);
done:
    end_call(&c);
    return result;
}

PyDoc_STRVAR(smoothquant_scale_doc,
"smoothquant_scale(activations, weights, alpha, dtype='float32')\n--\n\n"
"float32 [in]: weights^(1 - alpha), rounded to dtype, / activations^alpha, clamped to [1e-4, 1e4]; 1 for channels\n"
"that were silent. Both are maxima of |x| by channel (SmoothQuant, Xiao et al. 2023). ValueError: NaN, infinity or\n"
"less than 0.");

static PyObject *smoothquant_scale(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"activations", "weights", "alpha", "dtype", NULL};
    call c = {.state = mq_state_of(module)};
    PyObject *objects[2], *result = NULL;
    const char *dtype_name = "float32";
    float alpha;
    mq_dtype dtype;
    mq_tensor activations, weights, view;
    mq_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOf|s", names, &objects[0], &objects[1], &alpha, &dtype_name))
        return NULL;
    if (mq_parse_float_dtype(dtype_name, &dtype) < 0) return NULL;
    if (need_floats(&c, objects[0], "activations", 1, -1, &activations) < 0 ||
        need_floats(&c, objects[1], "weights", 1, activations.shape[0], &weights) < 0)
        goto done;
    result = new_floats(c.state, 1, activations.shape, &view);
    if (result != NULL && mq_smoothquant_scale(activations.data, weights.data, dtype, activations.shape[0], alpha,
                                               view.data, &err) != MQ_OK) {
        Py_CLEAR(result);
        mq_raise(&err);
    }
done:
    end_call(&c);
    return result;
}

/* ---- trials ---- */

typedef struct trial_args {
    call c;
    mq_tensor weight, scales, backs, factors;
    mq_trial trial;
    mq_candidate *candidates;
} trial_args;

/* One candidate for each of as many scales or factors as there are. */
static int make_candidates(trial_args *a)
{
    const int64_t n = a->weight.shape[1];
    int64_t count = 1;
    if (a->factors.data != NULL) count = a->factors.shape[0];
    if (a->scales.data != NULL) count = a->scales.shape[0];
    if (a->backs.data != NULL && (a->scales.data == NULL || a->backs.shape[0] != count)) {
        PyErr_SetString(PyExc_ValueError, "backs: as many as there are scales");
        return -1;
    }
    a->candidates = mq_alloc_zeroed((size_t)count * sizeof *a->candidates);
    if (a->candidates == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        mq_candidate *candidate = &a->candidates[i];
        candidate->factor = a->factors.data != NULL ? ((const float *)a->factors.data)[i] : 1.0f;
        if (a->scales.data != NULL) candidate->scale = (const float *)a->scales.data + i * n;
        if (a->backs.data != NULL) candidate->back = (const float *)a->backs.data + i * n;
    }
    a->trial.candidates = a->candidates;
    a->trial.count = count;
    return 0;
}

/* The quantizer's own maxima count only where there are no scales; one that takes them from the data has none. */
static int take_trial(trial_args *a, PyObject *quantizer_object, PyObject *gram)
{
    const mq_quantizer *quantizer = take_quantizer(&a->c, quantizer_object);
    if (quantizer == NULL || mq_gram_loss_of(a->c.state, gram, &a->trial.gram) < 0) return -1;
    a->trial.name = "weight";
    a->trial.weight = &a->weight;
    a->trial.spec = &quantizer->spec;
    const int takes_none = quantizer->spec.dynamic && quantizer->spec.scale == MQ_FMT_FP32;
    if (quantizer->amax == NULL || a->scales.data != NULL || takes_none) return 0;
    if (quantizer->amax_count != mq_trial_amax_count(&a->trial)) {
        PyErr_Format(PyExc_ValueError, "quantizer: %lld amax values, the weight has %lld",
                     (long long)quantizer->amax_count, (long long)mq_trial_amax_count(&a->trial));
        return -1;
    }
    a->trial.amax = quantizer->amax;
    a->trial.global_amax = quantizer->global_amax;
    return 0;
}

PyDoc_STRVAR(quantization_losses_doc,
"quantization_losses(weight, quantizer, gram=None, scales=None, backs=None, factors=None)\n--\n\n"
"float64 [candidates]: what ways to quantize a weight [out, in] lose: ||X (W - Q(W))^T||^2 with gram =\n"
"GramLoss(X^T X), or the squared difference of the weights.\n\n"
"scales [candidates, in]: columns are multiplied by them, rounded to weight's dtype, quantized by maxima found anew,\n"
"and multiplied by backs. factors [candidates]: the quantizer's maxima (or the weight's own) are multiplied by them.");

static PyObject *quantization_losses(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "quantizer", "gram", "scales", "backs", "factors", NULL};
    trial_args a = {.c.state = mq_state_of(module)};
    PyObject *weight, *quantizer, *gram = NULL, *scales = NULL, *backs = NULL, *factors = NULL, *result = NULL;
    mq_tensor view;
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OOOO", names, &weight, &quantizer, &gram, &scales, &backs,
                                     &factors))
        return NULL;
    if (take_matrix(&a.c, weight, "weight", &a.weight) < 0 ||
        take_floats(&a.c, scales, "scales", 2, a.weight.shape[1], &a.scales) < 0 ||
        take_floats(&a.c, backs, "backs", 2, a.weight.shape[1], &a.backs) < 0 ||
        take_floats(&a.c, factors, "factors", 1, a.scales.data != NULL ? a.scales.shape[0] : -1, &a.factors) < 0 ||
        take_trial(&a, quantizer, gram) < 0 || make_candidates(&a) < 0)
        goto done;
    result = mq_new_array(a.c.state, MQ_F64, 1, &a.trial.count, &view);
    if (result == NULL) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_trial_losses(&a.trial, view.data, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    mq_free(a.candidates);
    end_call(&a.c);
    return result;
}

PyDoc_STRVAR(best_amax_doc,
"best_amax(weight, quantizer, factors, gram=None, amax_dtype='float32')\n--\n\n"
"float32: for each of the quantizer's maxima (or of the weight's own, if it has none), flat, the product with the\n"
"factor that loses least of what it governs, the first of equal ones: the squared difference of the weights, or with\n"
"gram (whole, or blocks no wider than the maxima's) that of the outputs. amax_dtype: what products are rounded to.");

static PyObject *best_amax(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "quantizer", "factors", "gram", "amax_dtype", NULL};
    const char *amax_dtype = "float32";
    trial_args a = {.c.state = mq_state_of(module)};
    PyObject *weight, *quantizer, *factors, *gram = NULL, *result = NULL;
    mq_tensor view;
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|Os", names, &weight, &quantizer, &factors, &gram,
                                     &amax_dtype) ||
        mq_parse_float_dtype(amax_dtype, &a.trial.amax_dtype) < 0)
        return NULL;
    if (take_matrix(&a.c, weight, "weight", &a.weight) < 0 ||
        need_floats(&a.c, factors, "factors", 1, -1, &a.factors) < 0 || take_trial(&a, quantizer, gram) < 0 ||
        make_candidates(&a) < 0)
        goto done;
    const int64_t count = mq_trial_amax_count(&a.trial);
    result = new_floats(a.c.state, 1, &count, &view);
    if (result == NULL) goto done;
    memset(view.data, 0, (size_t)count * sizeof(float));        /* maxima of no rows are looked for by nobody */
    Py_BEGIN_ALLOW_THREADS
    rc = mq_trial_best_amax(&a.trial, view.data, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    mq_free(a.candidates);
    end_call(&a.c);
    return result;
}

PyDoc_STRVAR(sweep_block_scales_doc,
"sweep_block_scales(weight, global_amax, divisor=2688, hessian=None)\n--\n\n"
"float32 [out, in / 16]: the amax of each NVFP4 block of weight whose scale, of all positive FP8 numbers, loses\n"
"least: the squared error, or with hessian [in / 16, 16, 16] (X^T X of the block's inputs) that of the outputs.\n"
"ValueError: NaN or infinity in any of them.");

static PyObject *sweep_block_scales(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "global_amax", "divisor", "hessian", NULL};
    call c = {.state = mq_state_of(module)};
    PyObject *object, *hessian_object = NULL, *result = NULL;
    mq_tensor weight, hessian, view;
    mq_sweep_job job = {.name = "weight", .weight = &weight, .divisor = 2688.0f};
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Of|fO", names, &object, &job.global_amax, &job.divisor,
                                     &hessian_object))
        return NULL;
    if (take_matrix(&c, object, "weight", &weight) < 0 ||
        take_floats(&c, hessian_object, "hessian", 3, MQ_SWEEP_BLOCK, &hessian) < 0)
        goto done;
    const int64_t shape[2] = {weight.shape[0], weight.shape[1] / MQ_SWEEP_BLOCK};
    job.hessian = hessian.data;
    if (hessian.data != NULL && (hessian.shape[0] != shape[1] || hessian.shape[1] != MQ_SWEEP_BLOCK)) {
        PyErr_Format(PyExc_ValueError, "hessian: expected [%lld, 16, 16]", (long long)shape[1]);
        goto done;
    }
    result = new_floats(c.state, 2, shape, &view);
    if (result == NULL) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_sweep_block_scales(&job, view.data, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    end_call(&c);
    return result;
}

/* ---- GPTQ ---- */

PyDoc_STRVAR(factor_doc,
"factor(h)\n--\n\n"
"Factors a symmetric matrix h (float32 [n, n], writable, contiguous) in place: h = U diag(d) U^T with U upper\n"
"triangular and ones on its diagonal, which takes h's place. Returns d, float32 [n]. ValueError if h is not positive\n"
"definite; then h's contents are lost.");

static PyObject *factor(PyObject *module, PyObject *object)
{
    mq_state *state = mq_state_of(module);
    PyObject *reference = NULL, *result = NULL;
    mq_tensor h, view;
    mq_error err;
    int rc;
    char text[96];
    if (mq_view_object(state, object, "h", &h, &reference) < 0) return NULL;
    if (h.ndim != 2 || h.shape[0] != h.shape[1] || h.dtype != MQ_F32 || h.readonly || !mq_tensor_is_contiguous(&h)) {
        PyErr_Format(PyExc_ValueError, "h: expected a writable, contiguous float32 [n, n], got %s",
                     mq_tensor_describe(&h, text, sizeof text));
        goto done;
    }
    result = new_floats(state, 1, h.shape, &view);
    if (result == NULL) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_factor(h.data, h.shape[0], view.data, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    Py_DECREF(reference);
    return result;
}

/* order: int64 [n], every column once. */
static int take_order(call *c, PyObject *object, int64_t n, mq_tensor *out)
{
    PyObject *reference = NULL;
    *out = (mq_tensor){0};
    if (object == NULL || object == Py_None) return 0;
    if (mq_view_as(c->state, object, "order", MQ_I64, out, &reference) < 0) return -1;
    if (reference != NULL) c->kept[c->count++] = reference;
    char *seen = mq_alloc_zeroed((size_t)n + 1);
    if (seen == NULL) return PyErr_NoMemory(), -1;
    int sound = out->ndim == 1 && out->shape[0] == n;
    for (int64_t i = 0; sound && i < n; i++) {
        const int64_t column = ((const int64_t *)out->data)[i];
        sound = column >= 0 && column < n && !seen[column];
        if (sound) seen[column] = 1;
    }
    mq_free(seen);
    if (!sound) PyErr_Format(PyExc_ValueError, "order: expected each of %lld columns once", (long long)n);
    return sound ? 0 : -1;
}

PyDoc_STRVAR(gptq_doc,
"gptq(weight, quantizer, factor, curvature, order=None, block_size=128, regroup=False)\n--\n\n"
"(rounded weight, amax, loss): weight [out, in] rounded column by column, what each loses being fed to those behind\n"
"it (GPTQ, Frantar et al. 2023). quantizer: INT4, INT8, FP8 or static NVFP4, with its amax. factor, curvature: what\n"
"factor() made of X^T X in the order of processing; order [in]: the column that comes k-th. block_size: columns\n"
"between products. regroup: blocks of scales are made of the weights as they are when their turn comes; amax (flat)\n"
"says of which. loss: trace of D X^T X D^T for what the weight changed by, D.");

static PyObject *run_gptq(mq_state *state, const mq_gptq_job *job)
{
    const int64_t shape[2] = {job->weight->shape[0], job->weight->shape[1]}, count = job->quantizer->amax_count;
    mq_tensor out, amax;
    mq_error err;
    double loss;
    int rc;
    PyObject *weight = mq_new_array(state, job->weight->dtype, 2, shape, &out);
    PyObject *maxima = weight != NULL ? new_floats(state, 1, &count, &amax) : NULL;
    if (maxima == NULL) {
        Py_XDECREF(weight);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    rc = mq_gptq(job, &out, amax.data, &loss, &err);
    Py_END_ALLOW_THREADS
    if (rc == MQ_OK) return Py_BuildValue("NNd", weight, maxima, loss);
    Py_DECREF(weight);
    Py_DECREF(maxima);
    return mq_raise(&err);
}

static PyObject *gptq(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "quantizer", "factor", "curvature", "order", "block_size", "regroup", NULL};
    call c = {.state = mq_state_of(module)};
    PyObject *objects[4], *order_object = NULL, *result = NULL;
    mq_gptq_job job = {.name = "weight", .block_size = 128};
    long long block_size = 128;
    mq_tensor weight, u, curvature, order;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OLp", names, &objects[0], &objects[1], &objects[2],
                                     &objects[3], &order_object, &block_size, &job.regroup))
        return NULL;
    job.quantizer = take_quantizer(&c, objects[1]);
    if (job.quantizer == NULL || take_matrix(&c, objects[0], "weight", &weight) < 0 ||
        need_floats(&c, objects[2], "factor", 2, weight.shape[1], &u) < 0 ||
        need_floats(&c, objects[3], "curvature", 1, weight.shape[1], &curvature) < 0 ||
        take_order(&c, order_object, weight.shape[1], &order) < 0)
        goto done;
    if (u.data == NULL || curvature.data == NULL || u.shape[0] != weight.shape[1]) {
        PyErr_Format(PyExc_ValueError, "factor: expected [%lld, %lld] and its curvature", (long long)weight.shape[1],
                     (long long)weight.shape[1]);
        goto done;
    }
    if (block_size < 1) {
        PyErr_Format(PyExc_ValueError, "block_size: expected at least 1, got %lld", block_size);
        goto done;
    }
    job.weight = &weight;
    job.factor = u.data;
    job.curvature = curvature.data;
    job.order = order.data;
    job.block_size = block_size;
    result = run_gptq(c.state, &job);
done:
    end_call(&c);
    return result;
}

/* ---- low rank ---- */

PyDoc_STRVAR(subtract_product_doc,
"subtract_product(weight, up, down)\n--\n\n"
"weight [out, in] - up [out, rank] @ down [rank, in], computed in float32 and rounded once to weight's dtype.");

static PyObject *subtract_product(PyObject *module, PyObject *args)
{
    call c = {.state = mq_state_of(module)};
    PyObject *objects[3], *result = NULL;
    mq_tensor weight, up, down, out;
    mq_error err;
    int rc;
    if (!PyArg_ParseTuple(args, "OOO:subtract_product", &objects[0], &objects[1], &objects[2])) return NULL;
    if (take_matrix(&c, objects[0], "weight", &weight) < 0 ||
        need_floats(&c, objects[2], "down", 2, weight.shape[1], &down) < 0 ||
        need_floats(&c, objects[1], "up", 2, down.shape[0], &up) < 0)
        goto done;
    if (up.data == NULL || down.data == NULL || up.shape[0] != weight.shape[0] || down.shape[0] < 1) {
        PyErr_Format(PyExc_ValueError, "up, down: expected [%lld, rank] and [rank, %lld]", (long long)weight.shape[0],
                     (long long)weight.shape[1]);
        goto done;
    }
    result = mq_new_array(c.state, weight.dtype, 2, weight.shape, &out);
    if (result == NULL) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_subtract_product(&weight, up.data, down.data, down.shape[0], &out, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    end_call(&c);
    return result;
}

#define WITH_KEYWORDS(function) (PyCFunction)(void (*)(void))function, METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"awq_weight_scale", WITH_KEYWORDS(awq_weight_scale), awq_weight_scale_doc},
    {"awq_scales", awq_scales, METH_VARARGS, awq_scales_doc},
    {"smoothquant_scale", WITH_KEYWORDS(smoothquant_scale), smoothquant_scale_doc},
    {"quantization_losses", WITH_KEYWORDS(quantization_losses), quantization_losses_doc},
    {"best_amax", WITH_KEYWORDS(best_amax), best_amax_doc},
    {"sweep_block_scales", WITH_KEYWORDS(sweep_block_scales), sweep_block_scales_doc},
    {"factor", factor, METH_O, factor_doc},
    {"gptq", WITH_KEYWORDS(gptq), gptq_doc},
    {"subtract_product", subtract_product, METH_VARARGS, subtract_product_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_py_search = {.methods = methods};
