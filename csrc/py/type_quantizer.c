/* _core.Quantizer: the settings of one quantizer in the reference's words, its amax, and simulation on arrays. */
#include "py/type_quantizer.h"

#include "py/convert.h"
#include "py/ndarray.h"
#include "py/outputs.h"

#include "core/alloc.h"
#include "core/pool.h"
#include "quant/rows.h"
#include "quant/scale.h"

typedef struct QuantizerObject {
    PyObject_HEAD
    mq_quantizer core;
    PyObject *num_bits, *axis, *block_sizes; /* as given */
    int amax_ndim;
    int64_t amax_shape[MQ_MAX_NDIM];
    Py_buffer home;                          /* where a lent amax lies; home.obj NULL = nowhere else */
    int holders;                             /* uses that forbid replacing values; changed under the GIL */
    unsigned long long changes;              /* how often anything was set */
    mq_device_quantizer device;     /* on a GPU, if it was ever used there: */
    PyObject *library;              /* by this CudaLibrary */
} QuantizerObject;

/* ---- settings to spec ---- */

static int number_from(PyObject *object, const char *what, long low, long high, int64_t *out)
{
    const long value = PyLong_AsLong(object);
    if (value == -1 && PyErr_Occurred()) return -1;
    *out = value;
    if (value >= low && value <= high) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %ld to %ld, got %ld", what, low, high, value);
    return -1;
}

/* The float format spelled (exponent bits, mantissa bits). */
static int format_from_pair(PyObject *pair, const char *what, mq_format *out)
{
    int exponent, mantissa;
    PyObject *tuple = PySequence_Tuple(pair);
    int rc = tuple != NULL && PyTuple_GET_SIZE(tuple) == 2 ? 0 : -1;
    if (rc == 0 && !PyArg_ParseTuple(tuple, "ii", &exponent, &mantissa)) rc = -1;
    Py_XDECREF(tuple);
    for (int i = 0; rc == 0 && i < MQ_FMT_COUNT; i++) {
        const mq_codec c = mq_format_get((mq_format)i)->codec;
        if (c.kind == MQ_KIND_INT || c.exponent_bits != exponent || c.mantissa_bits != mantissa || c.bits > 8) continue;
        *out = (mq_format)i;
        return 0;
    }
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s: %R is neither a number of bits nor the (exponent, mantissa) bits of a format; "
                 "modelq._core.formats() lists them", what, pair);
    return -1;
}

static int spec_num_bits(mq_quant_spec *spec, PyObject *num_bits)
{
    if (PyLong_Check(num_bits)) {
        int64_t bits;
        if (number_from(num_bits, "num_bits", 2, 16, &bits) < 0) return -1;
        spec->kind = MQ_KIND_INT;
        spec->bits = (int)bits;
        spec->element = bits <= 4 ? MQ_FMT_INT4 : MQ_FMT_INT8;
        return 0;
    }
    spec->kind = MQ_KIND_FLOAT;
    if (format_from_pair(num_bits, "num_bits", &spec->element) < 0) return -1;
    spec->bits = mq_format_get(spec->element)->codec.bits;
    return 0;
}

/* The axes that keep a scale of their own: of a matrix, the first (rows) or the last (columns). */
static int spec_axis(mq_quant_spec *spec, PyObject *axis)
{
    int64_t at;
    PyObject *one = axis;
    if (axis == Py_None) return 0;
    if (PyTuple_Check(axis) && PyTuple_GET_SIZE(axis) == 1) one = PyTuple_GET_ITEM(axis, 0);
    if (!PyLong_Check(one) || number_from(one, "axis", -1, 1, &at) < 0) {
        PyErr_Format(PyExc_ValueError, "axis: expected None, 0 (rows) or -1 (columns), got %R", axis);
        return -1;
    }
    spec->block_rows = at == 0 ? 1 : 0;
    spec->block_cols = at == 0 ? 0 : 1;
    return 0;
}

static int spec_scale(mq_quant_spec *spec, PyObject *scale_bits)
{
    if (scale_bits == Py_None) return 0;
    if (format_from_pair(scale_bits, "block_sizes['scale_bits']", &spec->scale) < 0) return -1;
    if (spec->scale == MQ_FMT_E8M0 || spec->scale == MQ_FMT_FP8_E4M3) return 0;
    PyErr_Format(PyExc_ValueError, "block_sizes['scale_bits']: expected (8, 0) or (4, 3), got %R", scale_bits);
    return -1;
}

static int spec_type(mq_quant_spec *spec, PyObject *type, const char *what)
{
    if (PyUnicode_Check(type) && PyUnicode_CompareWithASCIIString(type, "dynamic") == 0) spec->dynamic = 1;
    else if (type != Py_None && !(PyUnicode_Check(type) && PyUnicode_CompareWithASCIIString(type, "static") == 0)) {
        PyErr_Format(PyExc_ValueError, "%s: expected 'static' or 'dynamic', got %R", what, type);
        return -1;
    }
    return 0;
}

/* Blocks whose largest may be mapped to 4 instead of 6 need scales half as large again: the tensor's leaves room. */
static int spec_four_over_six(mq_quant_spec *spec, PyObject *value)
{
    const int wanted = PyObject_IsTrue(value);
    if (wanted > 0) spec->second_divisor = MQ_FOUR_OVER_SIX_DIVISOR;
    return wanted < 0 ? -1 : 0;
}

/* One entry {axis: length or None} of block_sizes. */
static int spec_block(mq_quant_spec *spec, PyObject *key, PyObject *value)
{
    int64_t axis, length = 0;
    if (number_from(key, "block_sizes axis", -2, 1, &axis) < 0) return -1;
    if (value != Py_None && number_from(value, "block_sizes length", 1, INT32_MAX, &length) < 0) return -1;
    *(axis == -1 || axis == 1 ? &spec->block_cols : &spec->block_rows) = length;
    return 0;
}

/* Axes that block_sizes does not name have blocks of 1; a length of None is the whole extent. */
static int spec_block_sizes(mq_quant_spec *spec, PyObject *block_sizes)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    if (block_sizes == Py_None) return 0;
    if (!PyDict_Check(block_sizes)) {
        PyErr_Format(PyExc_ValueError, "block_sizes: expected a dict or None, got %R", block_sizes);
        return -1;
    }
    spec->block_rows = spec->block_cols = 1;
    while (PyDict_Next(block_sizes, &at, &key, &value)) {
        int rc = -1;
        if (PyLong_Check(key)) rc = spec_block(spec, key, value);
        else if (PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "type") == 0)
            rc = spec_type(spec, value, "block_sizes['type']");
        else if (PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "scale_bits") == 0)
            rc = spec_scale(spec, value);
        else if (PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "four_over_six") == 0)
            rc = spec_four_over_six(spec, value);
        else PyErr_Format(PyExc_ValueError, "block_sizes: %R is not supported", key);
        if (rc < 0) return -1;
    }
    return 0;
}

/* The first scheme with the same element, scale and blocks; blocks along rows may have another length. -1 if there is
 * none (per column, per token, other integers). */
static int find_scheme(const mq_quant_spec *spec)
{
    const int odd_int = spec->kind == MQ_KIND_INT &&
        ((spec->bits != 8 && spec->bits != 4) || spec->is_unsigned || spec->narrow_range);
    for (int i = 0; i < MQ_SCHEME_COUNT && !odd_int; i++) {
        const mq_scheme_row *row = mq_scheme_get((mq_scheme)i);
        if (row->element != spec->element || row->scale != spec->scale || row->block_rows != spec->block_rows) continue;
        const int along_rows = row->block_rows == 1 && row->block_cols > 0 && spec->block_cols > 1;
        if (along_rows || row->block_cols == spec->block_cols) return i;
    }
    return -1;
}

static int spec_check(mq_quant_spec *spec)
{
    spec->scheme = find_scheme(spec);
    if (spec->scale != MQ_FMT_FP32) {
        const int has_levels = spec->scale == MQ_FMT_FP8_E4M3 && spec->scheme >= 0;
        const int four_over_six = spec->second_divisor != 0.0f;
        if (has_levels && !four_over_six)
            spec->second_divisor = mq_scheme_get((mq_scheme)spec->scheme)->second_divisor;
        if (spec->scheme >= 0 && spec->block_cols % 8 == 0 && (spec->dynamic ? !four_over_six : has_levels)) return 0;
        PyErr_SetString(PyExc_ValueError,
                        "block_sizes: scales in (8, 0) need type 'dynamic', scales in (8, 0) or (4, 3) a format that "
                        "has such blocks and a length that is a multiple of 8 along the last axis, four_over_six "
                        "static blocks with scales in (4, 3)");
        return -1;
    }
    if (spec->kind == MQ_KIND_FLOAT && spec->element != MQ_FMT_FP8_E4M3) {
        PyErr_Format(PyExc_ValueError, "num_bits: format %s needs dynamic block_sizes with scale_bits",
                     mq_format_get(spec->element)->name);
        return -1;
    }
    return 0;
}

static int parse_spec(mq_quant_spec *spec, PyObject *num_bits, PyObject *axis, PyObject *block_sizes, PyObject *type)
{
    spec->scale = MQ_FMT_FP32;
    if (axis != Py_None && block_sizes != Py_None) {
        PyErr_SetString(PyExc_ValueError, "Quantizer: give axis or block_sizes, not both");
        return -1;
    }
    if (spec_num_bits(spec, num_bits) < 0 || spec_axis(spec, axis) < 0 || spec_block_sizes(spec, block_sizes) < 0 ||
        spec_type(spec, type, "type") < 0)
        return -1;
    return spec_check(spec);
}

/* ---- the object ---- */

static PyObject *quantizer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"num_bits", "axis", "block_sizes", "type", "narrow_range", "unsigned", "enabled", NULL};
    PyObject *num_bits = NULL, *axis = Py_None, *block_sizes = Py_None, *kind = Py_None;
    int enabled = 1;
    mq_quant_spec spec = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OOO$Oppp:Quantizer", names, &num_bits, &axis, &block_sizes, &kind,
                                     &spec.narrow_range, &spec.is_unsigned, &enabled))
        return NULL;
    PyObject *bits = num_bits != NULL ? Py_NewRef(num_bits) : PyLong_FromLong(8);
    if (bits == NULL || parse_spec(&spec, bits, axis, block_sizes, kind) < 0) {
        Py_XDECREF(bits);
        return NULL;
    }
    QuantizerObject *self = (QuantizerObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        Py_DECREF(bits);
        return NULL;
    }
    mq_quantizer_init(&self->core, &spec);
    self->core.enabled = enabled;
    self->num_bits = bits;
    self->axis = Py_NewRef(axis);
    self->block_sizes = block_sizes == Py_None ? Py_NewRef(Py_None) : PyDict_Copy(block_sizes);
    if (self->block_sizes == NULL) Py_CLEAR(self);
    return (PyObject *)self;
}

static int quantizer_traverse(QuantizerObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->num_bits);
    Py_VISIT(self->axis);
    Py_VISIT(self->block_sizes);
    return 0;
}

static int quantizer_clear(QuantizerObject *self)
{
    Py_CLEAR(self->num_bits);
    Py_CLEAR(self->axis);
    Py_CLEAR(self->block_sizes);
    return 0;
}

/* Lets go of the memory that no amax lies in any more. */
static void leave_home(QuantizerObject *self)
{
    if (self->home.obj != NULL && !self->core.lent) PyBuffer_Release(&self->home);
}

static void quantizer_dealloc(QuantizerObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    quantizer_clear(self);
    mq_device_quantizer_free(&self->device);
    Py_XDECREF(self->library);
    mq_quantizer_free(&self->core);
    leave_home(self);
    type->tp_free(self);
    Py_DECREF(type);
}

const mq_quantizer *mq_quantizer_hold(mq_state *state, PyObject *object)
{
    if (!Py_IS_TYPE(object, state->quantizer_type)) {
        PyErr_Format(PyExc_TypeError, "expected a Quantizer, got %s", Py_TYPE(object)->tp_name);
        return NULL;
    }
    QuantizerObject *self = (QuantizerObject *)object;
    self->holders++;
    return &self->core;
}

void mq_quantizer_release(PyObject *object)
{
    ((QuantizerObject *)object)->holders--;
}

mq_device_quantizer *mq_quantizer_on_device(PyObject *object, PyObject *library)
{
    QuantizerObject *self = (QuantizerObject *)object;
    if (self->library != library) {
        mq_device_quantizer_free(&self->device);
        Py_XSETREF(self->library, Py_NewRef(library));
    }
    return &self->device;
}

/* ---- attributes ---- */

/* Whether something may be set now, which is counted. */
static int check_free(QuantizerObject *self, const char *what)
{
    self->changes++;
    if (self->holders == 0) return 0;
    PyErr_Format(PyExc_RuntimeError, "Quantizer.%s: in use by a running computation", what);
    return -1;
}

static PyObject *values_get(QuantizerObject *self, const float *values, int ndim, const int64_t *shape)
{
    mq_tensor view;
    if (values == NULL) Py_RETURN_NONE;
    PyObject *array = mq_new_array(mq_state_of_object((PyObject *)self), MQ_F32, ndim, shape, &view);
    if (array != NULL) memcpy(view.data, values, (size_t)mq_tensor_count(&view) * sizeof(float));
    return array;
}

typedef int (*values_setter)(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err);

static int values_set(QuantizerObject *self, PyObject *value, const char *name, values_setter set, mq_tensor *view)
{
    mq_error err;
    PyObject *keep = NULL;
    if (check_free(self, name) < 0) return -1;
    *view = (mq_tensor){0};
    if (value != NULL && value != Py_None &&
        mq_view_as(mq_state_of_object((PyObject *)self), value, name, MQ_F32, view, &keep) < 0)
        return -1;
    int rc = set(&self->core, view->data, view->data != NULL ? mq_tensor_count(view) : 0, &err);
    leave_home(self);
    Py_XDECREF(keep);
    if (rc == MQ_OK) return 0;
    mq_raise(&err);
    return -1;
}

static PyObject *amax_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    return values_get(self, self->core.amax, self->amax_ndim, self->amax_shape);
}

static int amax_set(QuantizerObject *self, PyObject *value, void *unused)
{
    (void)unused;
    mq_tensor view;
    if (values_set(self, value, "amax", mq_quantizer_set_amax, &view) < 0) return -1;
    self->amax_ndim = view.ndim;
    memcpy(self->amax_shape, view.shape, sizeof self->amax_shape);
    return 0;
}

static PyObject *global_amax_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    return values_get(self, self->core.global_amax != 0.0f ? &self->core.global_amax : NULL, 0, NULL);
}

static int set_first(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err)
{
    if (values != NULL && count != 1)
        return mq_fail(err, MQ_ERR_VALUE, "global_amax: expected one number, got %lld", (long long)count);
    return mq_quantizer_set_global_amax(quantizer, values != NULL ? values[0] : 0.0f, err);
}

static int global_amax_set(QuantizerObject *self, PyObject *value, void *unused)
{
    (void)unused;
    mq_tensor view;
    return values_set(self, value, "global_amax", set_first, &view);
}

static PyObject *pre_scale_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    return values_get(self, self->core.pre_scale, 1, &self->core.pre_count);
}

static int pre_scale_set(QuantizerObject *self, PyObject *value, void *unused)
{
    (void)unused;
    mq_tensor view;
    return values_set(self, value, "pre_quant_scale", mq_quantizer_set_pre_scale, &view);
}

static PyObject *bias_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    return values_get(self, self->core.bias, 1, &self->core.bias_count);
}

static int bias_set(QuantizerObject *self, PyObject *value, void *unused)
{
    (void)unused;
    mq_tensor view;
    return values_set(self, value, "bias", mq_quantizer_set_bias, &view);
}

static PyObject *rotate_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(self->core.rotate);
}

static int rotate_set(QuantizerObject *self, PyObject *value, void *unused)
{
    (void)unused;
    int64_t columns = 0;
    mq_error err;
    if (check_free(self, "rotate") < 0) return -1;
    if (value != NULL && number_from(value, "rotate", 0, INT32_MAX, &columns) < 0) return -1;
    if (mq_quantizer_set_rotate(&self->core, columns, &err) == MQ_OK) return 0;
    mq_raise(&err);
    return -1;
}

static PyObject *enabled_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->core.enabled);
}

static int enabled_set(QuantizerObject *self, PyObject *value, void *unused)
{
    (void)unused;
    if (check_free(self, "enabled") < 0) return -1;
    const int enabled = value != NULL ? PyObject_IsTrue(value) : 0;
    if (enabled < 0) return -1;
    self->core.enabled = enabled;
    return 0;
}

static PyObject *object_get(QuantizerObject *self, void *offset)
{
    PyObject *object = *(PyObject **)(void *)((char *)self + (size_t)offset);
    return Py_NewRef(object != NULL ? object : Py_None);
}

static PyObject *changes_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->changes);
}

static PyObject *scheme_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    if (self->core.spec.scheme < 0) Py_RETURN_NONE;
    return PyUnicode_FromString(mq_scheme_get((mq_scheme)self->core.spec.scheme)->name);
}

static PyObject *second_divisor_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    return PyFloat_FromDouble((double)self->core.spec.second_divisor);
}

static PyObject *flag_get(QuantizerObject *self, void *offset)
{
    return PyBool_FromLong(*(int *)(void *)((char *)self + (size_t)offset));
}

static PyObject *needs_amax_get(QuantizerObject *self, void *unused)
{
    (void)unused;
    const mq_quant_spec *spec = &self->core.spec;
    return PyBool_FromLong(spec->scale == MQ_FMT_FP8_E4M3 || (spec->scale == MQ_FMT_FP32 && !spec->dynamic));
}

/* ---- repr ---- */

static PyObject *describe_amax(const QuantizerObject *self)
{
    const mq_quant_spec *spec = &self->core.spec;
    const float *amax = self->core.amax;
    if (spec->scale == MQ_FMT_E8M0) return PyUnicode_FromString("None");
    if (amax == NULL) return PyUnicode_FromString("dynamic");
    char text[96];
    float low = amax[0], high = amax[0];
    for (int64_t i = 1; i < self->core.amax_count; i++) {
        low = MQ_MIN(low, amax[i]);
        high = MQ_MAX(high, amax[i]);
    }
    if (self->core.amax_count == 1) PyOS_snprintf(text, sizeof text, "%.2e", (double)amax[0]);
    else
        PyOS_snprintf(text, sizeof text, "[%.2e, %.2e](%lld)", (double)low, (double)high,
                      (long long)self->core.amax_count);
    return PyUnicode_FromString(text);
}

static PyObject *describe_blocks(const QuantizerObject *self)
{
    if (self->block_sizes != Py_None) return PyUnicode_FromFormat("block_sizes=%R,", self->block_sizes);
    if (self->axis != Py_None) return PyUnicode_FromFormat("axis=%R", self->axis);
    return PyUnicode_FromString("per-tensor");
}

/* As the reference's TensorQuantizer prints itself. */
static PyObject *quantizer_repr(QuantizerObject *self)
{
    const mq_quant_spec *spec = &self->core.spec;
    const char *pre = self->core.pre_scale != NULL ? " pre_quant_scale" : "";
    if (!self->core.enabled) return PyUnicode_FromFormat("Quantizer(disabled%s)", pre);
    PyObject *amax = describe_amax(self), *blocks = describe_blocks(self), *text = NULL;
    if (amax != NULL && blocks != NULL)
        text = PyUnicode_FromFormat("Quantizer(%s%S bit%s fake %U amax=%U%s)", spec->is_unsigned ? "unsigned " : "",
                                    self->num_bits, spec->narrow_range ? " narrow" : "", blocks, amax, pre);
    Py_XDECREF(amax);
    Py_XDECREF(blocks);
    return text;
}

/* ---- call ---- */

typedef struct call_job {
    const mq_quantizer *quantizer;
    mq_quant_rows rows;
} call_job;

static void apply_rows(void *arg, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const call_job *job = arg;
    const int64_t size = (int64_t)mq_dtype_size(job->rows.dtype);
    mq_quant_rows part = job->rows;
    part.x = (const char *)part.x + begin * part.ldx * size;
    part.y = (char *)part.y + begin * part.ldy * size;
    part.rows = end - begin;
    mq_quantizer_apply(job->quantizer, &part);
}

/* Without an amax the reference takes that of the input. */
static int find_amax(mq_quantizer *quantizer, const mq_tensor *matrix, mq_error *err)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const int whole = spec->scale != MQ_FMT_FP32 && spec->dynamic;
    const mq_grid grid = mq_grid_make(matrix->shape[0], matrix->shape[1], whole ? 0 : spec->block_rows,
                                      whole ? 0 : spec->block_cols);
    const int64_t count = grid.rows * grid.cols;
    float *found = mq_alloc_array((size_t)count, sizeof(float));
    if (found == NULL) return mq_fail_memory(err, "amax", (size_t)count * sizeof(float));
    int rc = mq_amax(matrix, &grid, found, err);
    if (rc == MQ_OK) rc = mq_quantizer_set_amax(quantizer, found, count, err);
    mq_free(found);
    return rc;
}

static int apply_all(call_job *job, const mq_tensor *matrix, int find, mq_error *err)
{
    const mq_quant_spec *spec = &job->quantizer->spec;
    const int by_rows = spec->block_rows == 0 || spec->dynamic;
    mq_quantizer own = *job->quantizer;
    if (find) {
        int rc = find_amax(&own, matrix, err);
        if (rc != MQ_OK) return rc;
        job->quantizer = &own;
    }
    const int64_t grain = by_rows ? mq_rows_per_chunk(job->rows.cols) : MQ_MAX(job->rows.rows, (int64_t)1);
    mq_parallel_for(job->rows.rows, grain, apply_rows, job);
    if (find) {
        mq_free(own.amax);
        mq_free(own.block_amax);
    }
    return MQ_OK;
}

static PyObject *call_on(QuantizerObject *self, mq_state *state, const mq_tensor *x, PyObject *out)
{
    const mq_quant_spec *spec = &self->core.spec;
    const int needs = spec->scale == MQ_FMT_FP8_E4M3 || (spec->scale == MQ_FMT_FP32 && !spec->dynamic);
    const int find = self->core.enabled && needs && self->core.amax == NULL;
    const int64_t cols = x->ndim > 0 ? x->shape[x->ndim - 1] : 1, count = mq_tensor_count(x);
    mq_tensor y, matrix = mq_tensor_make(x->data, x->dtype, 2, (int64_t[]){cols > 0 ? count / cols : 0, cols});
    mq_error err;
    int rc = MQ_OK;
    if (!find && mq_quantizer_ready(&self->core, matrix.shape[0], cols, "Quantizer", &err) != MQ_OK)
        return mq_raise(&err);
    PyObject *result = mq_output_array(state, out, "out", x, &y);
    if (result == NULL || count == 0) return result;
    call_job job = {&self->core, {x->data, y.data, x->dtype, matrix.shape[0], cols, cols, cols, MQ_QUANT_ALL}};
    self->holders++;
    Py_BEGIN_ALLOW_THREADS
    rc = apply_all(&job, &matrix, find, &err);
    Py_END_ALLOW_THREADS
    self->holders--;
    return mq_result(result, rc, &err);
}

static PyObject *quantizer_call(QuantizerObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "out", NULL};
    mq_state *state = mq_state_of_object((PyObject *)self);
    PyObject *object, *out = NULL, *keep = NULL, *result = NULL;
    mq_tensor x;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:__call__", names, &object, &out)) return NULL;
    if (mq_view_contiguous(state, object, "x", &x, &keep) < 0) return NULL;
    if ((int)x.dtype > MQ_F16)
        PyErr_Format(PyExc_TypeError, "x: expected float32, bfloat16 or float16, got %s", mq_dtype_name(x.dtype));
    else
        result = call_on(self, state, &x, out);
    Py_DECREF(keep);
    return result;
}

static PyObject *lend(QuantizerObject *self, PyObject *memory)
{
    Py_buffer home;
    mq_error err;
    if (check_free(self, "lend") < 0) return NULL;
    if (PyObject_GetBuffer(memory, &home, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) return NULL;
    const int64_t wanted = 2 * self->core.amax_count * (int64_t)sizeof(float);
    int rc = -1;
    if (home.len != wanted || (uintptr_t)home.buf % sizeof(float) != 0 || self->core.lent)
        PyErr_Format(PyExc_ValueError, "lend: expected %lld aligned bytes, and an amax that is not lent yet, got %zd",
                     (long long)wanted, home.len);
    else if ((rc = mq_quantizer_lend(&self->core, home.buf, &err)) != MQ_OK) mq_raise(&err);
    if (rc != MQ_OK) {
        PyBuffer_Release(&home);
        return NULL;
    }
    self->home = home;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"lend", (PyCFunction)lend, METH_O,
     "lend(memory)\n--\n\n"
     "Move the amax of static blocks with scales in (4, 3), and as much again that is made of it, into a writable\n"
     "buffer of 8 * amax.size bytes, held until another amax is set. ValueError: no such amax, or another size."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"amax", (getter)amax_get, (setter)amax_set, "float32 array or None: what calibration found.", NULL},
    {"global_amax", (getter)global_amax_get, (setter)global_amax_set,
     "float32 0-d or None: the tensor's amax, beside those of static blocks with scales in (4, 3); None = the largest\n"
     "of theirs.", NULL},
    {"pre_quant_scale", (getter)pre_scale_get, (setter)pre_scale_set,
     "float32 [columns] or None: multiplies the input first, in the input's dtype.", NULL},
    {"bias", (getter)bias_get, (setter)bias_set,
     "float32 [columns] or None: subtracted before rounding and added after, in the input's dtype.", NULL},
    {"rotate", (getter)rotate_get, (setter)rotate_set,
     "0, or so many columns at a time are rotated by a normalised Hadamard matrix before anything is rounded.", NULL},
    {"home", (getter)object_get, NULL, "What was handed to lend(), while its amax lies there; None otherwise.",
     (void *)offsetof(QuantizerObject, home.obj)},
    {"is_lent", (getter)flag_get, NULL, "Whether its amax lies in memory that was handed to lend().",
     (void *)offsetof(QuantizerObject, core.lent)},
    {"enabled", (getter)enabled_get, (setter)enabled_set, "False: calls only copy (and apply pre_quant_scale).", NULL},
    {"changes", (getter)changes_get, NULL,
     "Grows whenever any of these is set: while it stays, the quantizer does what it did.", NULL},
    {"num_bits", (getter)object_get, NULL, "Bits of an integer, or (exponent, mantissa) bits.",
     (void *)offsetof(QuantizerObject, num_bits)},
    {"axis", (getter)object_get, NULL, "The axis that keeps a scale per index, or None.",
     (void *)offsetof(QuantizerObject, axis)},
    {"block_sizes", (getter)object_get, NULL, "{axis: length, 'type': ..., 'scale_bits': ...} or None.",
     (void *)offsetof(QuantizerObject, block_sizes)},
    {"narrow_range", (getter)flag_get, NULL, "Integers: -max to max.",
     (void *)offsetof(QuantizerObject, core.spec.narrow_range)},
    {"unsigned", (getter)flag_get, NULL, "Integers: 0 to 2 * max + 1.",
     (void *)offsetof(QuantizerObject, core.spec.is_unsigned)},
    {"is_dynamic", (getter)flag_get, NULL, "Whether (block) scales come from the data of each call.",
     (void *)offsetof(QuantizerObject, core.spec.dynamic)},
    {"second_divisor", (getter)second_divisor_get, NULL,
     "The tensor's amax over this is its scale, where scales have two levels; else 0.", NULL},
    {"needs_amax", (getter)needs_amax_get, NULL, "Whether calibration has to find an amax.", NULL},
    {"scheme", (getter)scheme_get, NULL, "Name of the row of schemes() that these settings are, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(quantizer_doc,
"Quantizer(num_bits=8, axis=None, block_sizes=None, *, type='static', narrow_range=False, unsigned=False, "
"enabled=True)\n--\n\n"
"One quantizer, in the words of Model Optimizer's QuantizerAttributeConfig.\n\n"
"num_bits: bits of an integer (2 to 16), or (exponent, mantissa) bits of a format. axis: 0 or -1 for a scale per\n"
"row or column. block_sizes: {-1: 16, 'type': 'dynamic', 'scale_bits': (4, 3)} and the like; a length of None is\n"
"the whole axis. Calling it on an array (float32, bfloat16, float16) simulates: FP8 and integers by the\n"
"reference's fake quantization (amax from the input if there is none), NVFP4 and MX by the rules of the exported\n"
"bytes.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)quantizer_doc}, {Py_tp_new, quantizer_new},       {Py_tp_dealloc, quantizer_dealloc},
    {Py_tp_traverse, quantizer_traverse}, {Py_tp_clear, quantizer_clear}, {Py_tp_repr, quantizer_repr},
    {Py_tp_call, quantizer_call},       {Py_tp_getset, getset},
    {Py_tp_methods, methods},           {0, NULL},
};

static PyType_Spec spec = {
    .name = "modelq._core.Quantizer",
    .basicsize = sizeof(QuantizerObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

static int quantizer_init(PyObject *module, mq_state *state)
{
    state->quantizer_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->quantizer_type != NULL ? PyModule_AddType(module, state->quantizer_type) : -1;
}

const mq_py_part mq_py_quantizer = {.init = quantizer_init};
