/* Products and attention as the runtime runs them, on arrays with any row stride, and the choice of the micro-kernel. */
#include "testing/testing.h"

#include <time.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/gemm.h"

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
"c (+)= alpha * a @ w.T + bias in place, by the kind MQ_GEMM_BF16 or MQ_GEMM_F32; transposed: a @ w. Returns the seconds of\n"
"packing and of the product, the fastest of repeat.");

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

PyDoc_STRVAR(force_kernel_doc,
"force_kernel(bf16, name)\n--\n\n"
"Compute products of this kind with the micro-kernel of this name; None: the best. Returns the name in use. ValueError if the\n"
"kernel cannot run here, or does not serve the kind.");

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

static PyMethodDef methods[] = {
    {"gemm", (PyCFunction)(void (*)(void))gemm, METH_VARARGS | METH_KEYWORDS, gemm_doc},
    {"force_kernel", force_kernel, METH_VARARGS, force_kernel_doc},
    {"pool_threads", pool_threads, METH_O, pool_threads_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_testing_gemm = {.methods = methods};
