#include "py/parts.h"

#include "py/convert.h"
#include "py/ndarray.h"

static int find_scheme(const char *name, mq_scheme *out)
{
    if (mq_scheme_find(name, out) == MQ_OK) return 0;
    PyErr_Format(PyExc_ValueError, "unknown scheme '%s'; modelq._core.schemes() lists them", name);
    return -1;
}

/* None or 0: the scheme's own. */
static int parse_block_size(PyObject *object, int64_t *out)
{
    *out = 0;
    if (object == NULL || object == Py_None) return 0;
    *out = PyLong_AsLongLong(object);
    if (*out == -1 && PyErr_Occurred()) return -1;
    if (*out >= 0) return 0;
    PyErr_Format(PyExc_ValueError, "block_size: expected a positive number, got %lld", (long long)*out);
    return -1;
}

int mq_parse_scheme(const char *name, PyObject *block_size, mq_block_job *job)
{
    return find_scheme(name, &job->scheme) < 0 ? -1 : parse_block_size(block_size, &job->block_cols);
}

int mq_parse_float_dtype(const char *name, mq_dtype *out)
{
    if (mq_dtype_from_name(name, out) == MQ_OK && (int)*out <= MQ_F16) return 0;
    PyErr_Format(PyExc_ValueError, "dtype: expected float32, bfloat16 or float16, got '%s'", name);
    return -1;
}

enum { PART_WEIGHT, PART_SCALE, PART_SCALE_2, PARTS };
static const char *const roles[PARTS] = {"weight", "weight_scale", "weight_scale_2"};

static int same_layout(mq_dtype got, mq_dtype wanted)
{
    return got == wanted || (mq_dtype_size(got) == 1 && (got == MQ_U8 || (wanted == MQ_U8 && got == MQ_F8_E8M0)));
}

/* Views parts[role]: float32 by conversion, one-byte codes as they are. */
static int view_part(mq_state *state, PyObject *dict, int role, int is_float, mq_tensor *out, PyObject **keep)
{
    PyObject *object = PyMapping_GetItemString(dict, roles[role]);
    if (object == NULL) {
        PyErr_Format(PyExc_ValueError, "parts: '%s' is missing", roles[role]);
        return -1;
    }
    int rc = is_float ? mq_view_as(state, object, roles[role], MQ_F32, out, keep)
                      : mq_view_contiguous(state, object, roles[role], out, keep);
    Py_DECREF(object);
    return rc;
}

static int view_given(mq_state *state, PyObject *dict, const mq_scheme_row *row, mq_tensor *out, PyObject **keep)
{
    if (view_part(state, dict, PART_WEIGHT, 0, &out[PART_WEIGHT], &keep[PART_WEIGHT]) < 0 ||
        view_part(state, dict, PART_SCALE, row->scale == MQ_FMT_FP32, &out[PART_SCALE], &keep[PART_SCALE]) < 0)
        return -1;
    if (row->second_divisor == 0.0f) return 0;
    return view_part(state, dict, PART_SCALE_2, 1, &out[PART_SCALE_2], &keep[PART_SCALE_2]);
}

/* *want becomes a view of a part that is laid out as it says. */
static int use_part(int role, const mq_tensor *got, mq_tensor *want)
{
    char have[96], expected[96];
    if (!same_layout(got->dtype, want->dtype) || mq_tensor_count(got) != mq_tensor_count(want)) {
        PyErr_Format(PyExc_ValueError, "%s: expected %s, got %s", roles[role],
                     mq_tensor_describe(want, expected, sizeof expected), mq_tensor_describe(got, have, sizeof have));
        return -1;
    }
    want->data = got->data;
    return 0;
}

/* [rows, cols] of the matrix whose packed weight this is. */
static int unpacked_shape(const mq_scheme_row *row, const mq_tensor *weight, int64_t *shape)
{
    if (weight->ndim != 2) {
        PyErr_Format(PyExc_ValueError, "weight: expected 2 dimensions, got %d", weight->ndim);
        return -1;
    }
    shape[0] = weight->shape[0] * (row->packing == MQ_PACK_ROW_PAIRS ? 2 : 1);
    shape[1] =
        row->packing == MQ_PACK_ROW ? weight->shape[1] * 8 / mq_format_get(row->element)->codec.bits : weight->shape[1];
    return 0;
}

static int fill_parts(const mq_tensor *given, mq_stored_weight *weight)
{
    mq_parts *parts = &weight->parts;
    mq_error err;
    if (unpacked_shape(mq_scheme_get(weight->job.scheme), &given[PART_WEIGHT], weight->shape) < 0) return -1;
    if (mq_block_shapes(&weight->job, weight->shape[0], weight->shape[1], parts, &err) != MQ_OK) {
        mq_raise(&err);
        return -1;
    }
    if (use_part(PART_WEIGHT, &given[PART_WEIGHT], &parts->weight) < 0 ||
        use_part(PART_SCALE, &given[PART_SCALE], &parts->scale) < 0)
        return -1;
    return parts->has_scale_2 ? use_part(PART_SCALE_2, &given[PART_SCALE_2], &parts->scale_2) : 0;
}

int mq_view_parts(mq_state *state, PyObject *dict, mq_stored_weight *weight, PyObject **keep)
{
    PyObject *arrays[PARTS] = {NULL};
    mq_tensor given[PARTS];
    *keep = NULL;
    if (view_given(state, dict, mq_scheme_get(weight->job.scheme), given, arrays) == 0 &&
        fill_parts(given, weight) == 0)
        *keep = PyTuple_Pack(PARTS, arrays[0], arrays[1], arrays[2] ? arrays[2] : Py_None);
    for (int i = 0; i < PARTS; i++) Py_XDECREF(arrays[i]);
    return *keep != NULL ? 0 : -1;
}

static int view_scaling(mq_state *state, PyObject *object, const char *name, const float **values, int64_t *count,
                        PyObject **keep)
{
    mq_tensor view;
    *keep = NULL;
    if (object == Py_None) return 0;
    if (mq_view_as(state, object, name, MQ_F32, &view, keep) < 0) return -1;
    *values = view.data;
    *count = mq_tensor_count(&view);
    return 0;
}

/* Sizes of the weight, and of the parts that will be made of it. */
static int measure_numbers(const mq_tensor *numbers, mq_stored_weight *weight)
{
    char text[96];
    mq_error err;
    if (numbers->ndim != 2 || (numbers->dtype != MQ_F32 && numbers->dtype != weight->dtype)) {
        PyErr_Format(PyExc_ValueError, "%s: expected float32 or %s of 2 dimensions, got %s", weight->job.name,
                     mq_dtype_name(weight->dtype), mq_tensor_describe(numbers, text, sizeof text));
        return -1;
    }
    for (int i = 0; i < 2; i++) weight->shape[i] = numbers->shape[i];
    if (mq_block_shapes(&weight->job, weight->shape[0], weight->shape[1], &weight->parts, &err) == MQ_OK) return 0;
    mq_raise(&err);
    return -1;
}

int mq_view_numbers(mq_state *state, PyObject *array, PyObject *scaling, mq_stored_weight *weight, PyObject **keep)
{
    PyObject *amax, *block_amax, *keeps[PARTS] = {NULL};
    mq_block_job *job = &weight->job;
    *keep = NULL;
    if (PyArg_ParseTuple(scaling, "OOf", &amax, &block_amax, &job->second_divisor) &&
        mq_view_object(state, array, job->name, &weight->numbers, &keeps[0]) == 0 &&
        measure_numbers(&weight->numbers, weight) == 0 &&
        view_scaling(state, amax, "amax", &job->amax, &job->amax_count, &keeps[1]) == 0 &&
        view_scaling(state, block_amax, "block_amax", &job->block_amax, &job->block_amax_count, &keeps[2]) == 0)
        *keep = PyTuple_Pack(PARTS, keeps[0], keeps[1] ? keeps[1] : Py_None, keeps[2] ? keeps[2] : Py_None);
    for (int i = 0; i < PARTS; i++) Py_XDECREF(keeps[i]);
    return *keep != NULL ? 0 : -1;
}
