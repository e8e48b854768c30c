/* straight_through: the gradient of what a Quantizer was given, from that of what it gave. */
#include "py/convert.h"
#include "py/ndarray.h"
#include "py/type_quantizer.h"

#include "core/pool.h"
#include "quant/rows.h"
#include "quant/straight_through.h"

typedef struct job {
    const mq_quantizer *quantizer;
    mq_gradient_rows rows;
} job;

static void run_rows(void *arg, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const job *work = arg;
    mq_quantizer_gradient(work->quantizer, &work->rows, begin, end);
}

static int check(const mq_tensor *x, const mq_tensor *gradient)
{
    char one[96], other[96];
    int same = x->ndim == gradient->ndim && x->dtype == gradient->dtype;
    for (int i = 0; same && i < x->ndim; i++) same = x->shape[i] == gradient->shape[i];
    if (same && (int)x->dtype <= MQ_F16) return 0;
    PyErr_Format((int)x->dtype > MQ_F16 ? PyExc_TypeError : PyExc_ValueError,
                 "straight_through: expected a gradient like x, float32, bfloat16 or float16, got %s for %s",
                 mq_tensor_describe(gradient, one, sizeof one), mq_tensor_describe(x, other, sizeof other));
    return -1;
}

static PyObject *gradient_of(mq_state *state, const mq_quantizer *quantizer, const mq_tensor *x,
                             const mq_tensor *gradient)
{
    const int64_t cols = x->ndim > 0 ? x->shape[x->ndim - 1] : 1, count = mq_tensor_count(x);
    const int64_t rows = cols > 0 ? count / cols : 0;
    mq_tensor out;
    mq_error err;
    const int masks = quantizer->enabled && quantizer->amax != NULL;
    if (masks && mq_quantizer_ready(quantizer, rows, cols, "straight_through", &err) != MQ_OK) return mq_raise(&err);
    PyObject *result = mq_new_array(state, x->dtype, x->ndim, x->shape, &out);
    if (result == NULL || count == 0) return result;
    job work = {quantizer, {x->dtype, rows, cols, x->data, gradient->data, out.data}};
    Py_BEGIN_ALLOW_THREADS
    mq_parallel_for(rows, mq_rows_per_chunk(cols), run_rows, &work);
    Py_END_ALLOW_THREADS
    return result;
}

PyDoc_STRVAR(straight_through_doc,
"straight_through(quantizer, x, gradient)\n--\n\n"
"The gradient [..., columns] of a loss by x, what a Quantizer was given, from the gradient by what it gave: the same,\n"
"but zero where a magnitude was above its amax, and with pre_quant_scale and rotation undone as the chain rule wants.\n"
"x and gradient: alike, float32, bfloat16 or float16. ValueError: different shapes, or an amax of another shape.");

static PyObject *straight_through(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"quantizer", "x", "gradient", NULL};
    mq_state *state = mq_state_of(module);
    PyObject *quantizer, *objects[2], *keep[2] = {NULL, NULL}, *result = NULL;
    mq_tensor x, gradient;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:straight_through", names, &quantizer, &objects[0], &objects[1]))
        return NULL;
    if (mq_view_contiguous(state, objects[0], "x", &x, &keep[0]) < 0) return NULL;
    if (mq_view_contiguous(state, objects[1], "gradient", &gradient, &keep[1]) == 0 && check(&x, &gradient) == 0) {
        const mq_quantizer *held = mq_quantizer_hold(state, quantizer);
        if (held != NULL) {
            result = gradient_of(state, held, &x, &gradient);
            mq_quantizer_release(quantizer);
        }
    }
    Py_DECREF(keep[0]);
    Py_XDECREF(keep[1]);
    return result;
}

static PyMethodDef methods[] = {
    {"straight_through", (PyCFunction)(void (*)(void))straight_through, METH_VARARGS | METH_KEYWORDS,
     straight_through_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_py_straight_through = {.methods = methods};
