/* Products and attention as the runtime runs them, on arrays with any row stride, and the choice of the
 * micro-kernel. */
#include "testing/testing.h"

#include <string.h>
#include <time.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/gemm.h"
#include "kernels/softmax.h"
#include "model/attention.h"
#include "py/parts.h"

typedef struct product {
    mq_tensor a, w, bias, c;
    PyObject *keep[4];
    mq_gemm_kind kind;
    int transposed, accumulate, repeat;
    float alpha;
    double pack_seconds, run_seconds; /* the fastest repetition */
} product;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Rows of neighbouring elements in a type that products take. */
static int check_matrix(const mq_tensor *tensor, const char *name)
{
    if ((tensor->dtype == MQ_F32 || tensor->dtype == MQ_BF16) && tensor->ndim == 2 &&
        (tensor->stride[1] == 1 || tensor->shape[1] <= 1 || tensor->shape[0] == 0))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected rows of float32 or bfloat16", name);
    return -1;
}

static int view_operands(mq_state *state, product *p, PyObject *const *objects)
{
    if (mq_view_object(state, objects[0], "a", &p->a, &p->keep[0]) < 0 || check_matrix(&p->a, "a") < 0) return -1;
    if (mq_view_object(state, objects[1], "w", &p->w, &p->keep[1]) < 0 || check_matrix(&p->w, "w") < 0) return -1;
    if (mq_view_object(state, objects[2], "c", &p->c, &p->keep[2]) < 0 || check_matrix(&p->c, "c") < 0) return -1;
    if (objects[3] != Py_None && mq_view_as(state, objects[3], "bias", MQ_F32, &p->bias, &p->keep[3]) < 0) return -1;
    const int64_t n = p->w.shape[p->transposed], k = p->w.shape[!p->transposed];
    if (p->a.shape[1] == k && p->c.shape[0] == p->a.shape[0] && p->c.shape[1] == n && !p->c.readonly &&
        (p->keep[3] == NULL || mq_tensor_count(&p->bias) == n))
        return 0;
    PyErr_SetString(PyExc_ValueError, "gemm: shapes do not fit");
    return -1;
}

static void compute(product *p, void *memory)
{
    const int64_t n = p->w.shape[p->transposed], k = p->w.shape[!p->transposed];
    mq_packed packed = {.data = memory};
    mq_gemm_args args = {
        .m = p->a.shape[0], .a = p->a.data, .a_dtype = p->a.dtype, .lda = p->a.stride[0], .b = &packed,
        .bias = p->bias.data, .c = p->c.data, .c_dtype = p->c.dtype, .ldc = p->c.stride[0],
        .accumulate = p->accumulate, .alpha = p->alpha,
    };
    p->pack_seconds = p->run_seconds = 1e9;
    for (int i = 0; i < p->repeat; i++) {
        double start = now();
        (p->transposed ? mq_gemm_pack_transposed : mq_gemm_pack)(p->kind, p->w.data, p->w.dtype, n, k, p->w.stride[0],
                                                                &packed);
        double packed_at = now();
        mq_gemm_run(&args);
        double end = now();
        p->pack_seconds = MQ_MIN(p->pack_seconds, packed_at - start);
        p->run_seconds = MQ_MIN(p->run_seconds, end - packed_at);
    }
}

PyDoc_STRVAR(gemm_doc,
"gemm(bf16, a, w, c, bias=None, alpha=1.0, accumulate=False, transposed=False, repeat=1)\n--\n\n"
"c (+)= alpha * a @ w.T + bias in place, by the kind MQ_GEMM_BF16 or MQ_GEMM_F32; transposed: a @ w. Returns the\n"
"seconds of packing and of the product, the fastest of repeat.");

static PyObject *gemm(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"bf16", "a", "w", "c", "bias", "alpha", "accumulate", "transposed", "repeat", NULL};
    PyObject *objects[4] = {NULL, NULL, NULL, Py_None}, *result = NULL;
    product p = {.alpha = 1, .repeat = 1};
    int bf16;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "pOOO|Ofppi", names, &bf16, &objects[0], &objects[1], &objects[2],
                                     &objects[3], &p.alpha, &p.accumulate, &p.transposed, &p.repeat))
        return NULL;
    p.kind = bf16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    void *memory = NULL;
    if (view_operands(mq_state_of(module), &p, objects) < 0) goto done;
    memory = mq_alloc(mq_gemm_packed_size(p.kind, p.w.shape[p.transposed], p.w.shape[!p.transposed]));
    if (memory == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    compute(&p, memory);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("dd", p.pack_seconds, p.run_seconds);
done:
    mq_free(memory);
    for (size_t i = 0; i < MQ_COUNT(p.keep); i++) Py_XDECREF(p.keep[i]);
    return result;
}

PyDoc_STRVAR(gemm_codes_doc,
"gemm_codes(bf16, a, parts, scheme, dtype, c, block_size=None, repeat=1)\n--\n\n"
"c = a @ w.T, w being what parts stand for in dtype, without making w. Returns the seconds of packing and of the\n"
"product, the fastest of repeat; how many bytes the packed operand has; whether all of w is finite.");

typedef struct coded_product {
    mq_tensor a, c;
    mq_stored_weight weight;
    mq_coded_matrix matrix;
    mq_gemm_kind kind;
    int repeat, finite;
    double pack_seconds, run_seconds;
    size_t nbytes;
} coded_product;

static void compute_codes(coded_product *p, void *memory)
{
    mq_packed packed = {.data = memory};
    const mq_gemm_args args = {
        .m = p->a.shape[0], .a = p->a.data, .a_dtype = p->a.dtype, .lda = p->a.stride[0], .b = &packed,
        .c = p->c.data, .c_dtype = p->c.dtype, .ldc = p->c.stride[0], .alpha = 1,
    };
    p->pack_seconds = p->run_seconds = 1e9;
    for (int i = 0; i < p->repeat; i++) {
        const double start = now();
        p->finite = mq_gemm_pack_codes(p->kind, &p->matrix, &packed);
        const double packed_at = now();
        mq_gemm_run(&args);
        p->run_seconds = MQ_MIN(p->run_seconds, now() - packed_at);
        p->pack_seconds = MQ_MIN(p->pack_seconds, packed_at - start);
    }
    p->nbytes = mq_packed_nbytes(&packed);
}

static int check_codes(coded_product *p)
{
    p->matrix = mq_stored_codes(&p->weight);
    if (check_matrix(&p->a, "a") < 0 || check_matrix(&p->c, "c") < 0) return -1;
    if (p->a.shape[1] == p->matrix.k && p->c.shape[0] == p->a.shape[0] && p->c.shape[1] == p->matrix.n &&
        mq_gemm_can_code(&p->matrix))
        return 0;
    PyErr_SetString(PyExc_ValueError, "gemm_codes: shapes do not fit, or blocks do not");
    return -1;
}

static PyObject *gemm_codes(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"bf16", "a", "parts", "scheme", "dtype", "c", "block_size", "repeat", NULL};
    PyObject *a, *c, *parts, *block_size = NULL, *keep[3] = {NULL}, *result = NULL;
    const char *scheme, *dtype;
    mq_state *state = mq_state_of(module);
    coded_product p = {.repeat = 1};
    void *memory = NULL;
    int bf16;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "pOOssO|Oi", names, &bf16, &a, &parts, &scheme, &dtype, &c,
                                     &block_size, &p.repeat))
        return NULL;
    p.kind = bf16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    if (mq_parse_scheme(scheme, block_size, &p.weight.job) < 0 || mq_parse_float_dtype(dtype, &p.weight.dtype) < 0 ||
        mq_view_parts(state, parts, &p.weight, &keep[0]) < 0 || mq_view_object(state, a, "a", &p.a, &keep[1]) < 0 ||
        mq_view_object(state, c, "c", &p.c, &keep[2]) < 0 || check_codes(&p) < 0)
        goto done;
    memory = mq_alloc(mq_gemm_coded_size(p.kind, &p.matrix));
    if (memory == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    compute_codes(&p, memory);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("ddnO", p.pack_seconds, p.run_seconds, (Py_ssize_t)p.nbytes, p.finite ? Py_True : Py_False);
done:
    mq_free(memory);
    for (size_t i = 0; i < MQ_COUNT(keep); i++) Py_XDECREF(keep[i]);
    return result;
}

PyDoc_STRVAR(force_kernel_doc,
"force_kernel(bf16, name)\n--\n\n"
"Compute products of this kind with the micro-kernel of this name; None: the best. Returns the name in use.\n"
"ValueError if the kernel cannot run here, or does not serve the kind.");

static PyObject *force_kernel(PyObject *module, PyObject *args)
{
    int bf16;
    const char *name;
    (void)module;
    if (!PyArg_ParseTuple(args, "pz", &bf16, &name)) return NULL;
    mq_gemm_kind kind = bf16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    if (mq_gemm_force_kernel(kind, name) != MQ_OK) return PyErr_Format(PyExc_ValueError, "no kernel %s here", name);
    return PyUnicode_FromString(mq_gemm_kernel_name(kind));
}

PyDoc_STRVAR(pool_threads_doc,
"pool_threads(n)\n--\n\n"
"Threads of this extension's own pool.");

static PyObject *pool_threads(PyObject *module, PyObject *argument)
{
    int n = (int)PyLong_AsLong(argument);
    (void)module;
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (mq_pool_set_threads(n) != MQ_OK) return PyErr_Format(PyExc_RuntimeError, "not inside a job");
    Py_RETURN_NONE;
}

typedef struct attention_call {
    mq_tensor q, k, v, out, mask;
    PyObject *keep[5];
    mq_attention_args args;
} attention_call;

/* [tokens, heads, size], of which the last two are contiguous. */
static int view_heads(mq_state *state, PyObject *object, const char *name, mq_tensor *out, PyObject **keep)
{
    if (mq_view_object(state, object, name, out, keep) < 0) return -1;
    if (out->ndim == 3 && out->stride[2] == 1 && out->stride[1] == out->shape[2]) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected [tokens, heads, size]", name);
    return -1;
}

static int view_attention(mq_state *state, attention_call *call, PyObject *const *objects)
{
    mq_attention_args *args = &call->args;
    if (view_heads(state, objects[0], "q", &call->q, &call->keep[0]) < 0) return -1;
    if (view_heads(state, objects[1], "k", &call->k, &call->keep[1]) < 0) return -1;
    if (view_heads(state, objects[2], "v", &call->v, &call->keep[2]) < 0) return -1;
    if (view_heads(state, objects[3], "out", &call->out, &call->keep[3]) < 0) return -1;
    if (objects[4] != Py_None && mq_view_as(state, objects[4], "mask", MQ_U8, &call->mask, &call->keep[4]) < 0)
        return -1;
    args->T = call->q.shape[0];
    args->T_kv = call->k.shape[0];
    args->heads = call->q.shape[1];
    args->kv_heads = call->k.shape[1];
    args->head_dim = call->q.shape[2];
    args->value_dim = call->v.shape[2];
    args->dtype = call->q.dtype;
    args->q = call->q.data, args->k = call->k.data, args->v = call->v.data, args->out = call->out.data;
    args->ldq = call->q.stride[0], args->ldk = call->k.stride[0], args->ldv = call->v.stride[0];
    args->ldo = call->out.stride[0];
    args->key_mask = call->mask.data;
    return 0;
}

PyDoc_STRVAR(attention_doc,
"attention(q, k, v, out, scale, past=0, mask=None, window=0, repeat=1)\n--\n\n"
"Causal attention of q [T, heads, size] over k, v [T_kv, kv_heads, size] into out. Returns the fastest of repeat, in\n"
"seconds.");

static PyObject *attention(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"q", "k", "v", "out", "scale", "past", "mask", "window", "repeat", NULL};
    PyObject *objects[5] = {NULL, NULL, NULL, NULL, Py_None}, *result = NULL;
    attention_call call = {.keep = {NULL}};
    long long past = 0, window = 0;
    int repeat = 1;
    double best = 1e9;
    void *scratch = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOf|LOLi", names, &objects[0], &objects[1], &objects[2],
                                     &objects[3], &call.args.scale, &past, &objects[4], &window, &repeat))
        return NULL;
    if (view_attention(mq_state_of(module), &call, objects) < 0) goto done;
    call.args.past = past;
    call.args.window = window;
    scratch = mq_alloc(mq_attention_scratch(&call.args));
    if (scratch == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    for (int i = 0; i < repeat; i++) {
        double start = now();
        mq_attention_forward(&call.args, scratch);
        best = MQ_MIN(best, now() - start);
    }
    Py_END_ALLOW_THREADS
    result = PyFloat_FromDouble(best);
done:
    mq_free(scratch);
    for (size_t i = 0; i < MQ_COUNT(call.keep); i++) Py_XDECREF(call.keep[i]);
    return result;
}

PyDoc_STRVAR(softmax_exp_doc,
"softmax_exp(isa, x)\n--\n\n"
"exp of float32 as attention computes it, by the table of this ISA; ValueError if it cannot run here.");

static PyObject *softmax_exp(PyObject *module, PyObject *args)
{
    const char *isa;
    PyObject *object, *keep = NULL, *result;
    mq_tensor x, y;
    if (!PyArg_ParseTuple(args, "sO", &isa, &object)) return NULL;
    for (int i = 0; i < MQ_ISA_COUNT; i++) {
        if (strcmp(isa, mq_isa_name((mq_isa)i)) != 0 || !mq_isa_supported((mq_isa)i)) continue;
        if (mq_view_as(mq_state_of(module), object, "x", MQ_F32, &x, &keep) < 0) return NULL;
        result = mq_new_array(mq_state_of(module), MQ_F32, x.ndim, x.shape, &y);
        if (result != NULL) mq_softmax_table_of((mq_isa)i)->exp(x.data, y.data, mq_tensor_count(&x));
        Py_DECREF(keep);
        return result;
    }
    return PyErr_Format(PyExc_ValueError, "no ISA %s here", isa);
}

static PyMethodDef methods[] = {
    {"gemm", (PyCFunction)(void (*)(void))gemm, METH_VARARGS | METH_KEYWORDS, gemm_doc},
    {"gemm_codes", (PyCFunction)(void (*)(void))gemm_codes, METH_VARARGS | METH_KEYWORDS, gemm_codes_doc},
    {"attention", (PyCFunction)(void (*)(void))attention, METH_VARARGS | METH_KEYWORDS, attention_doc},
    {"softmax_exp", softmax_exp, METH_VARARGS, softmax_exp_doc},
    {"force_kernel", force_kernel, METH_VARARGS, force_kernel_doc},
    {"pool_threads", pool_threads, METH_O, pool_threads_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_testing_gemm = {.methods = methods};
