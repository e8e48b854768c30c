/* Quantizers on arrays of a CUDA device: memory comes in by DLPack, work goes to the stream that the caller names, and
 * nothing waits. The GIL is kept: handing work to a stream takes microseconds, and a quantizer's numbers on the device
 * are one set. */
#include "py/convert.h"
#include "py/dlpack.h"
#include "py/ndarray.h"
#include "py/type_cuda.h"
#include "py/type_quantizer.h"

/* One call: the device that its arrays are on is the current one from enter to leave. */
typedef struct call {
    const mq_backend *backend;
    PyObject *library;
    Py_ssize_t stream;
    int device, before;
    mq_error err;
} call;

/* An array as a matrix of its last axis. */
typedef struct operand {
    PyObject *owner;
    mq_tensor tensor;
    mq_cuda_matrix matrix;
    int device;
} operand;

static void *stream_of(const call *call)
{
    return (void *)call->stream;    /* 1 and 2 are names that CUDA knows, too (cudaStreamLegacy, cudaStreamPerThread) */
}

static int view(const call *call, PyObject *object, const char *name, operand *out)
{
    char text[96];
    out->owner = NULL;
    if (mq_dlpack_import_device(object, name, call->stream, &out->tensor, &out->device, &out->owner) < 0) return -1;
    const mq_tensor *tensor = &out->tensor;
    const int64_t cols = tensor->ndim > 0 ? tensor->shape[tensor->ndim - 1] : 1;
    const int64_t rows = cols > 0 ? mq_tensor_count(tensor) / cols : 0;
    out->matrix = (mq_cuda_matrix){tensor->data, tensor->dtype, rows, cols, MQ_MAX(cols, (int64_t)1)};
    if ((int)tensor->dtype <= MQ_F16 && mq_tensor_is_contiguous(tensor)) return 0;
    PyErr_Format((int)tensor->dtype > MQ_F16 ? PyExc_TypeError : PyExc_ValueError,
                 "%s: expected a contiguous array of float32, bfloat16 or float16, got %s", name,
                 mq_tensor_describe(tensor, text, sizeof text));
    return -1;
}

static int check_alike(const operand *a, const operand *b, const char *name)
{
    char one[96], other[96];
    if (a->matrix.dtype == b->matrix.dtype && a->matrix.rows == b->matrix.rows && a->matrix.cols == b->matrix.cols &&
        a->device == b->device)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected an array like x %s, got %s", name,
                 mq_tensor_describe(&a->tensor, one, sizeof one), mq_tensor_describe(&b->tensor, other, sizeof other));
    return -1;
}

static int check_writable(const operand *a, const char *name)
{
    if (!a->tensor.readonly) return 0;
    PyErr_Format(PyExc_ValueError, "%s: is read-only", name);
    return -1;
}

static int enter(call *call, int device)
{
    call->device = device;
    int rc = call->backend->device_current(&call->before, &call->err);
    if (rc == MQ_OK && device != call->before) rc = call->backend->device_set(device, &call->err);
    if (rc != MQ_OK) mq_raise(&call->err);
    return rc == MQ_OK ? 0 : -1;
}

/* None, or NULL with the exception of rc. */
static PyObject *leave(call *call, int rc)
{
    mq_error err;
    if (call->device != call->before) call->backend->device_set(call->before, &err);
    if (rc != MQ_OK) return mq_raise(&call->err);
    Py_RETURN_NONE;
}

static int begin(PyObject *module, call *call, PyObject *library)
{
    call->library = library;
    if (call->stream < 0) {     /* -1 is a word of DLPack's for a producer: it need not order anything */
        PyErr_Format(PyExc_ValueError, "stream: expected a cudaStream_t as a number, got %zd", call->stream);
        return -1;
    }
    if (call->stream == 0) call->stream = 1;
    return mq_backend_of(mq_state_of(module), library, &call->backend);
}

static void drop(operand *operands, int count)
{
    for (int i = 0; i < count; i++) Py_XDECREF(operands[i].owner);
}

/* ---- a quantizer's rounding ---- */

static PyObject *quantize(PyObject *module, call *call, PyObject *object, const operand *operands, mq_quant_steps steps)
{
    const mq_quantizer *quantizer = mq_quantizer_hold(mq_state_of(module), object);
    const mq_cuda_matrix *x = &operands[0].matrix;
    PyObject *result = NULL;
    if (quantizer == NULL) return NULL;
    const int needs = quantizer->spec.scale == MQ_FMT_FP8_E4M3 ||
                      (quantizer->spec.scale == MQ_FMT_FP32 && !quantizer->spec.dynamic);
    const int find = quantizer->enabled && needs && quantizer->amax == NULL;
    if (!find && mq_quantizer_ready(quantizer, x->rows, x->cols, "Quantizer", &call->err) != MQ_OK) {
        mq_raise(&call->err);
    } else if (enter(call, operands[0].device) == 0) {
        const mq_device_rows rows = {.x = *x, .y = operands[1].matrix, .steps = steps, .find = find};
        mq_device_quantizer *device = mq_quantizer_on_device(object, call->library);
        result = leave(call, mq_device_quantizer_apply(device, call->backend, call->device, quantizer, &rows,
                                                       stream_of(call), &call->err));
    }
    mq_quantizer_release(object);
    return result;
}

PyDoc_STRVAR(cuda_quantize_doc,
"cuda_quantize(library, quantizer, x, out, stream, prepare=False)\n--\n\n"
"out = quantizer(x) on a CUDA device: contiguous arrays alike, by DLPack; float32, bfloat16 or float16. stream: a\n"
"cudaStream_t as a number, where this is done; nothing waits. prepare: only pre_quant_scale and rotation.");

static PyObject *cuda_quantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"library", "quantizer", "x", "out", "stream", "prepare", NULL};
    PyObject *library, *quantizer, *objects[2], *result = NULL;
    operand operands[2] = {{0}};
    call call = {0};
    int prepare = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOn|p:cuda_quantize", names, &library, &quantizer, &objects[0],
                                     &objects[1], &call.stream, &prepare))
        return NULL;
    if (begin(module, &call, library) == 0 && view(&call, objects[0], "x", &operands[0]) == 0 &&
        view(&call, objects[1], "out", &operands[1]) == 0 && check_writable(&operands[1], "out") == 0 &&
        check_alike(&operands[0], &operands[1], "out") == 0)
        result = quantize(module, &call, quantizer, operands, prepare ? MQ_QUANT_PREPARE : MQ_QUANT_ALL);
    drop(operands, 2);
    return result;
}

/* ---- its gradient ---- */

static PyObject *gradient_of(PyObject *module, call *call, PyObject *object, const operand *operands)
{
    const mq_quantizer *quantizer = mq_quantizer_hold(mq_state_of(module), object);
    const mq_cuda_matrix *x = &operands[0].matrix;
    PyObject *result = NULL;
    if (quantizer == NULL) return NULL;
    const int masks = quantizer->enabled && quantizer->amax != NULL;
    if (masks && mq_quantizer_ready(quantizer, x->rows, x->cols, "straight_through", &call->err) != MQ_OK) {
        mq_raise(&call->err);
    } else if (enter(call, operands[0].device) == 0) {
        const mq_device_gradient rows = {.x = *x, .gradient = operands[1].matrix, .out = operands[2].matrix};
        mq_device_quantizer *device = mq_quantizer_on_device(object, call->library);
        result = leave(call, mq_device_quantizer_gradient(device, call->backend, call->device, quantizer, &rows,
                                                          stream_of(call), &call->err));
    }
    mq_quantizer_release(object);
    return result;
}

PyDoc_STRVAR(cuda_straight_through_doc,
"cuda_straight_through(library, quantizer, x, gradient, out, stream)\n--\n\n"
"out = straight_through(quantizer, x, gradient) on a CUDA device; arrays and stream as in cuda_quantize.");

static PyObject *cuda_straight_through(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"library", "quantizer", "x", "gradient", "out", "stream", NULL};
    PyObject *library, *quantizer, *objects[3], *result = NULL;
    operand operands[3] = {{0}};
    call call = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOn:cuda_straight_through", names, &library, &quantizer,
                                     &objects[0], &objects[1], &objects[2], &call.stream))
        return NULL;
    if (begin(module, &call, library) == 0 && view(&call, objects[0], "x", &operands[0]) == 0 &&
        view(&call, objects[1], "gradient", &operands[1]) == 0 && view(&call, objects[2], "out", &operands[2]) == 0 &&
        check_writable(&operands[2], "out") == 0 && check_alike(&operands[0], &operands[1], "gradient") == 0 &&
        check_alike(&operands[0], &operands[2], "out") == 0)
        result = gradient_of(module, &call, quantizer, operands);
    drop(operands, 3);
    return result;
}

/* ---- maxima ---- */

static int check_maxima(const operand *x, const operand *out, int64_t block_rows, int64_t block_cols)
{
    const mq_grid grid = mq_grid_make(x->matrix.rows, x->matrix.cols, block_rows, block_cols);
    char text[96];
    if (out->matrix.dtype == MQ_F32 && mq_tensor_count(&out->tensor) == grid.rows * grid.cols &&
        out->device == x->device)
        return 0;
    PyErr_Format(PyExc_ValueError, "out: expected float32 [%lld, %lld] on the device of x, got %s",
                 (long long)grid.rows, (long long)grid.cols, mq_tensor_describe(&out->tensor, text, sizeof text));
    return -1;
}

PyDoc_STRVAR(cuda_amax_doc,
"cuda_amax(library, x, out, stream, block_rows=0, block_cols=0)\n--\n\n"
"out float32 [block rows, block columns] = the largest magnitudes of x's blocks on a CUDA device (0: the whole\n"
"extent); NaN wins. Arrays and stream as in cuda_quantize.");

static PyObject *cuda_amax(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"library", "x", "out", "stream", "block_rows", "block_cols", NULL};
    PyObject *library, *objects[2], *result = NULL;
    operand operands[2] = {{0}};
    long long rows = 0, cols = 0;
    call call = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOn|LL:cuda_amax", names, &library, &objects[0], &objects[1],
                                     &call.stream, &rows, &cols))
        return NULL;
    if (begin(module, &call, library) == 0 && view(&call, objects[0], "x", &operands[0]) == 0 &&
        view(&call, objects[1], "out", &operands[1]) == 0 && check_writable(&operands[1], "out") == 0 &&
        check_maxima(&operands[0], &operands[1], rows, cols) == 0 && enter(&call, operands[0].device) == 0) {
        const mq_cuda_amax_job job = {operands[0].matrix, rows, cols, operands[1].tensor.data};
        result = leave(&call, call.backend->amax(&job, stream_of(&call), &call.err));
    }
    drop(operands, 2);
    return result;
}

/* ---- to the host ---- */

PyDoc_STRVAR(cuda_to_host_doc,
"cuda_to_host(library, x, stream)\n--\n\n"
"A NumPy array of the values of a contiguous array on a CUDA device. This waits for the stream.");

static PyObject *cuda_to_host(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"library", "x", "stream", NULL};
    PyObject *library, *object, *result = NULL;
    operand x = {0};
    mq_tensor out;
    call call = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOn:cuda_to_host", names, &library, &object, &call.stream))
        return NULL;
    if (begin(module, &call, library) == 0 && view(&call, object, "x", &x) == 0)
        result = mq_new_array(mq_state_of(module), x.tensor.dtype, x.tensor.ndim, x.tensor.shape, &out);
    if (result != NULL && enter(&call, x.device) == 0) {
        const size_t nbytes = (size_t)mq_tensor_count(&x.tensor) * mq_dtype_size(x.tensor.dtype);
        int rc = call.backend->copy(out.data, x.tensor.data, nbytes, stream_of(&call), &call.err);
        if (rc == MQ_OK) rc = call.backend->stream_wait(stream_of(&call), &call.err);
        PyObject *none = leave(&call, rc);
        if (none == NULL) Py_CLEAR(result);
        Py_XDECREF(none);
    } else {
        Py_CLEAR(result);
    }
    drop(&x, 1);
    return result;
}

#define WITH_KEYWORDS(function) (PyCFunction)(void (*)(void))function, METH_VARARGS | METH_KEYWORDS

static PyMethodDef methods[] = {
    {"cuda_amax", WITH_KEYWORDS(cuda_amax), cuda_amax_doc},
    {"cuda_quantize", WITH_KEYWORDS(cuda_quantize), cuda_quantize_doc},
    {"cuda_straight_through", WITH_KEYWORDS(cuda_straight_through), cuda_straight_through_doc},
    {"cuda_to_host", WITH_KEYWORDS(cuda_to_host), cuda_to_host_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_py_cuda_arrays = {.methods = methods};
