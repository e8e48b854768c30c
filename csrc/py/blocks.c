/* amax, quantize, dequantize and fake_quantize on arrays. */
#include "py/convert.h"
#include "py/ndarray.h"
#include "py/outputs.h"
#include "py/parts.h"

#include "format/pack.h"
#include "quant/block.h"
#include "quant/scale.h"

/* ---- amax ---- */

/* Blocks of the matrix that x is seen as, and the shape of the result. */
typedef struct amax_plan {
    int64_t block_rows, block_cols;
    int ndim;
    int64_t shape[MQ_MAX_NDIM];
} amax_plan;

static int plan_axis(PyObject *axis, const mq_tensor *x, amax_plan *plan)
{
    const long at = PyLong_AsLong(axis);
    if (at == -1 && PyErr_Occurred()) return -1;
    const long last = x->ndim - 1;
    if (x->ndim == 0 || (at != 0 && at != -1 && at != last)) {
        PyErr_Format(PyExc_ValueError, "axis: expected the first or the last of %d dimensions, got %ld", x->ndim, at);
        return -1;
    }
    const int first = at == 0 && x->ndim > 1;
    plan->block_rows = first ? 1 : 0;
    plan->block_cols = first ? 0 : 1;
    plan->ndim = x->ndim;
    for (int i = 0; i < x->ndim; i++) plan->shape[i] = 1;
    plan->shape[first ? 0 : last] = x->shape[first ? 0 : last];
    return 0;
}

static int plan_block(PyObject *block, const mq_tensor *x, amax_plan *plan)
{
    long long rows = 1, cols;
    const int both = PyTuple_Check(block);
    if (both ? !PyArg_ParseTuple(block, "LL", &rows, &cols)
             : (cols = PyLong_AsLongLong(block)) == -1 && PyErr_Occurred())
        return -1;
    if (rows < 1 || cols < 1 || x->ndim < 1 || (both && x->ndim != 2)) {
        PyErr_SetString(PyExc_ValueError,
                        "block: expected a positive length along the last axis, or (rows, columns) of a matrix");
        return -1;
    }
    plan->block_rows = rows;
    plan->block_cols = cols;
    plan->ndim = x->ndim;
    for (int i = 0; i < x->ndim; i++) plan->shape[i] = x->shape[i];
    if (both) plan->shape[0] = MQ_CEIL_DIV(x->shape[0], (int64_t)rows);
    plan->shape[x->ndim - 1] = MQ_CEIL_DIV(x->shape[x->ndim - 1], (int64_t)cols);
    return 0;
}

/* x as a matrix: leading dimensions are rows (or, with rows of the first axis, the others are columns). x is
 * contiguous, or 2-D. */
static mq_tensor as_matrix(const mq_tensor *x, int split_first)
{
    if (x->ndim == 2) return *x;
    const int64_t count = mq_tensor_count(x);
    int64_t rows = x->ndim == 0 ? 1 : split_first ? x->shape[0] : 1;
    for (int i = 0; !split_first && i + 1 < x->ndim; i++) rows *= x->shape[i];
    int64_t cols = x->ndim == 0 ? 1 : rows != 0 ? count / rows : 0;
    mq_tensor matrix = mq_tensor_make(x->data, x->dtype, 2, (int64_t[]){rows, cols});
    return matrix;
}

static PyObject *amax_of(mq_state *state, const mq_tensor *x, const amax_plan *plan)
{
    mq_tensor out;
    PyObject *result = mq_new_array(state, MQ_F32, plan->ndim, plan->shape, &out);
    if (result == NULL || mq_tensor_count(&out) == 0) return result;
    const mq_tensor matrix = as_matrix(x, plan->block_rows == 1 && plan->block_cols == 0);
    const mq_grid grid = mq_grid_make(matrix.shape[0], matrix.shape[1], plan->block_rows, plan->block_cols);
    mq_error err;
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_amax(&matrix, &grid, out.data, &err);
    Py_END_ALLOW_THREADS
    return mq_result(result, rc, &err);
}

PyDoc_STRVAR(amax_doc,
"amax(x, axis=None, block=None)\n--\n\n"
"Largest magnitudes of x (float32, bfloat16 or float16) as float32; NaN wins over everything.\n\n"
"axis None: of the whole array, 0-d. axis 0 or -1: one per index of that axis, other dimensions kept as 1. block\n"
"n: of every n elements along the last axis, shape [..., ceil(I / n)]. block (r, c): of every r x c block of a\n"
"matrix. Partial blocks count what they have.");

static PyObject *amax(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "axis", "block", NULL};
    PyObject *object, *axis = Py_None, *block = Py_None, *keep = NULL, *result = NULL;
    mq_state *state = mq_state_of(module);
    amax_plan plan = {0};
    mq_tensor x;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:amax", names, &object, &axis, &block)) return NULL;
    if (mq_view_object(state, object, "x", &x, &keep) < 0) return NULL;
    if (x.ndim != 2) {
        PyObject *array = keep;
        int rc = mq_view_contiguous(state, array, "x", &x, &keep);
        Py_DECREF(array);
        if (rc < 0) return NULL;
    }
    if ((int)x.dtype > MQ_F16) {
        PyErr_Format(PyExc_TypeError, "x: expected float32, bfloat16 or float16, got %s", mq_dtype_name(x.dtype));
        goto done;
    }
    if (axis != Py_None && block != Py_None) {
        PyErr_SetString(PyExc_ValueError, "amax: give axis or block, not both");
        goto done;
    }
    if (axis != Py_None && plan_axis(axis, &x, &plan) < 0) goto done;
    if (block != Py_None && plan_block(block, &x, &plan) < 0) goto done;
    result = amax_of(state, &x, &plan);
done:
    Py_DECREF(keep);
    return result;
}

/* ---- quantize, fake_quantize ---- */

typedef struct quantize_args {
    mq_block_job job;
    mq_tensor weight, amax, block_amax;
    PyObject *out; /* borrowed, or NULL */
    PyObject *weight_keep, *amax_keep, *block_amax_keep;
} quantize_args;

static void release_args(quantize_args *a)
{
    Py_CLEAR(a->weight_keep);
    Py_CLEAR(a->amax_keep);
    Py_CLEAR(a->block_amax_keep);
}

static int view_amax(mq_state *state, PyObject *object, const char *name, mq_tensor *view, PyObject **keep)
{
    return object == Py_None ? 0 : mq_view_as(state, object, name, MQ_F32, view, keep);
}

static int parse_quantize(mq_state *state, PyObject *args, PyObject *kwargs, quantize_args *a)
{
    static char *names[] = {"weight", "scheme", "amax", "block_size", "name", "out", "block_amax", "second_divisor",
                            NULL};
    PyObject *weight, *amax_object = Py_None, *block_size = NULL, *block_amax = Py_None;
    const char *scheme;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|OOzOOf", names, &weight, &scheme, &amax_object, &block_size,
                                     &a->job.name, &a->out, &block_amax, &a->job.second_divisor))
        return -1;
    if (a->out == Py_None) a->out = NULL;
    if (mq_parse_scheme(scheme, block_size, &a->job) < 0) return -1;
    const char *name = a->job.name != NULL ? a->job.name : "weight";
    if (mq_view_object(state, weight, name, &a->weight, &a->weight_keep) < 0) return -1;
    if (a->weight.ndim != 2) {
        PyErr_Format(PyExc_ValueError, "%s: expected 2 dimensions, got %d", name, a->weight.ndim);
        return -1;
    }
    if (view_amax(state, amax_object, "amax", &a->amax, &a->amax_keep) < 0 ||
        view_amax(state, block_amax, "block_amax", &a->block_amax, &a->block_amax_keep) < 0)
        return -1;
    a->job.amax = a->amax.data;
    a->job.amax_count = a->amax_keep != NULL ? mq_tensor_count(&a->amax) : 0;
    a->job.block_amax = a->block_amax.data;
    a->job.block_amax_count = a->block_amax_keep != NULL ? mq_tensor_count(&a->block_amax) : 0;
    return 0;
}

/* The arguments of a call, and how the parts that the scheme makes of its weight are laid out. */
static int prepare_quantize(mq_state *state, PyObject *args, PyObject *kwargs, quantize_args *a, mq_parts *parts)
{
    mq_error err;
    if (parse_quantize(state, args, kwargs, a) < 0) return -1;
    if (mq_block_shapes(&a->job, a->weight.shape[0], a->weight.shape[1], parts, &err) == MQ_OK) return 0;
    mq_raise(&err);
    return -1;
}

/* dict[role] becomes an array laid out as *part says, taken from given if there is one; *part then views it. */
static int add_part(mq_state *state, PyObject *dict, PyObject *given, const char *role, mq_tensor *part)
{
    PyObject *out = given != NULL ? PyMapping_GetItemString(given, role) : NULL;
    if (given != NULL && out == NULL) return -1;
    PyObject *array = mq_output_array(state, out, role, part, part);
    Py_XDECREF(out);
    if (array == NULL) return -1;
    int rc = PyDict_SetItemString(dict, role, array);
    Py_DECREF(array);
    return rc;
}

static PyObject *make_parts(mq_state *state, PyObject *given, mq_parts *parts)
{
    PyObject *dict = PyDict_New();
    if (dict == NULL) return NULL;
    if (add_part(state, dict, given, "weight", &parts->weight) < 0 ||
        add_part(state, dict, given, "weight_scale", &parts->scale) < 0 ||
        (parts->has_scale_2 && add_part(state, dict, given, "weight_scale_2", &parts->scale_2) < 0))
        Py_CLEAR(dict);
    return dict;
}

PyDoc_STRVAR(quantize_doc,
"quantize(weight, scheme, amax=None, block_size=None, name=None, out=None, block_amax=None, second_divisor=0)\n"
"--\n\n"
"The parts of weight (float32, bfloat16 or float16 [out, in], any strides) in a scheme, as an exported checkpoint\n"
"holds them: {'weight', 'weight_scale'} and for two-level schemes 'weight_scale_2'.\n\n"
"amax None: computed from the weight. Otherwise one value for schemes with a second level (of the whole tensor),\n"
"one per block for the others; schemes with e8m0 scales take none. block_size replaces the scheme's block length\n"
"along rows. name stands for the tensor in errors. out: a dict as an earlier call returned, to write into.\n"
"block_amax: of schemes with a second level, the maxima of blocks as calibration chose them (static scales), with\n"
"second_divisor, if not 0, in the place of the scheme's (1536 for four-over-six). NaN, infinity, or a shape that the\n"
"scheme cannot hold: ValueError.");

static PyObject *quantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    mq_state *state = mq_state_of(module);
    quantize_args a = {0};
    mq_parts parts;
    mq_error err;
    PyObject *result = NULL;
    if (prepare_quantize(state, args, kwargs, &a, &parts) < 0) goto done;
    result = make_parts(state, a.out, &parts);
    if (result == NULL) goto done;
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_block_quantize(&a.job, &a.weight, &parts, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    release_args(&a);
    return result;
}

PyDoc_STRVAR(fake_quantize_doc,
"fake_quantize(weight, scheme, amax=None, block_size=None, name=None, out=None, block_amax=None,\n"
"              second_divisor=0)\n--\n\n"
"What quantize() and dequantize() to weight's dtype give, in one pass: an array like weight. Takes what\n"
"quantize() takes; out may be weight itself.");

static PyObject *fake_quantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    mq_state *state = mq_state_of(module);
    quantize_args a = {0};
    mq_parts parts;
    mq_tensor out;
    mq_error err;
    PyObject *result = NULL;
    if (prepare_quantize(state, args, kwargs, &a, &parts) < 0) goto done;
    const mq_tensor shape = mq_tensor_make(NULL, a.weight.dtype, 2, a.weight.shape);
    result = mq_output_array(state, a.out, "out", &shape, &out);
    if (result == NULL) goto done;
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_block_fake_quantize(&a.job, &a.weight, &out, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    release_args(&a);
    return result;
}

/* ---- dequantize ---- */

PyDoc_STRVAR(dequantize_doc,
"dequantize(parts, scheme, dtype='float32', block_size=None, out=None)\n--\n\n"
"The matrix that parts (as quantize() makes them, or as read from a checkpoint) stand for: element * (scale *\n"
"scale_2) computed in float32 and rounded to dtype ('float32', 'bfloat16' or 'float16').");

static PyObject *dequantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"parts", "scheme", "dtype", "block_size", "out", NULL};
    mq_state *state = mq_state_of(module);
    PyObject *dict, *block_size = NULL, *given_out = NULL, *keep = NULL, *result = NULL;
    const char *scheme, *dtype_name = "float32";
    mq_stored_weight weight = {.dtype = MQ_F32};
    mq_tensor out;
    mq_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|sOO:dequantize", names, &dict, &scheme, &dtype_name, &block_size,
                                     &given_out))
        return NULL;
    if (mq_parse_scheme(scheme, block_size, &weight.job) < 0 || mq_parse_float_dtype(dtype_name, &weight.dtype) < 0 ||
        mq_view_parts(state, dict, &weight, &keep) < 0)
        return NULL;
    const mq_tensor wanted = mq_tensor_make(NULL, weight.dtype, 2, weight.shape);
    result = mq_output_array(state, given_out, "out", &wanted, &out);
    if (result == NULL) goto done;
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_block_dequantize(&weight.job, &weight.parts, &out, &err);
    Py_END_ALLOW_THREADS
    result = mq_result(result, rc, &err);
done:
    Py_DECREF(keep);
    return result;
}

#define WITH_KEYWORDS(function) (PyCFunction)(void (*)(void))function, METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"amax", WITH_KEYWORDS(amax), amax_doc},
    {"quantize", WITH_KEYWORDS(quantize), quantize_doc},
    {"dequantize", WITH_KEYWORDS(dequantize), dequantize_doc},
    {"fake_quantize", WITH_KEYWORDS(fake_quantize), fake_quantize_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_py_blocks = {.methods = methods};
