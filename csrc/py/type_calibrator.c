/* Calibrator: statistics of the tensors that reach a quantizer (csrc/calib). */
#include "py/runtime.h"

#include <string.h>

#include "calib/gram.h"
#include "calib/histogram.h"
#include "core/alloc.h"

PyDoc_STRVAR(calibrator_doc,
"Calibrator(kind='max', axis=None, option=0)\n--\n\n"
"Statistics of activations, to find a quantizer's amax.\n\n"
"kind: 'max', the largest magnitude; 'affine', a bias per entry of the last axis (the running average of the means\n"
"of each call's rows) and the largest magnitude beside it; 'affine_max_min', the bias half-way between smallest and\n"
"largest; 'mean_abs', the mean of |x| per entry of the last axis (option 1: each call's mean, rounded to its dtype,\n"
"counts once); 'histogram' of |x| (option: bins, 0 = 2048); 'gram', X^T X of the rows (option: size of the blocks on\n"
"its diagonal that are to be kept, 0 = all of it).\n"
"axis: None for one value per tensor, -1 for one per entry of the last axis ('max'; 'mean_abs' and 'gram' always).\n"
"collect may be called from several threads; the result does not depend on their order. NaN and infinities are\n"
"remembered and reported by compute_amax.");

static mq_calib *calib_of(PyObject *self)
{
    return ((CalibratorObject *)self)->calib;
}

static int parse_axis(PyObject *axis, mq_calib_axis *out)
{
    *out = MQ_CALIB_TENSOR;
    if (axis == NULL || axis == Py_None) return 0;
    long value = PyLong_AsLong(axis);
    if (value == -1 && PyErr_Occurred()) return -1;
    *out = MQ_CALIB_LAST;
    if (value == -1) return 0;
    PyErr_Format(PyExc_ValueError, "Calibrator: axis must be None or -1 (the last), got %ld", value);
    return -1;
}

/* What a kind takes for its axis and option; -1 with ValueError set. */
static int check_arguments(const mq_calib_kind *kind, mq_calib_axis *axis, long long option)
{
    const int per_channel = kind == &mq_calib_mean_abs || kind == &mq_calib_gram;
    const int histogram = kind == &mq_calib_histogram;
    const long long most = histogram ? MQ_HISTOGRAM_MAX_BINS : kind == &mq_calib_gram ? 1 << 20 : per_channel;
    if (per_channel) *axis = MQ_CALIB_LAST;
    if ((kind->bias != NULL || histogram) && *axis != MQ_CALIB_TENSOR)
        PyErr_Format(PyExc_ValueError, "Calibrator: kind '%s' finds one amax: axis must be None", kind->name);
    else if (option < 0 || option > most || (histogram && option == 1))
        PyErr_Format(PyExc_ValueError, "Calibrator: option %lld is out of range for kind '%s'", option, kind->name);
    else return 0;
    return -1;
}

static PyObject *unknown_kind(const char *name)
{
    PyObject *list = PyUnicode_FromString("");
    for (const char *const *kind = mq_calib_kinds(); list != NULL && *kind != NULL; kind++) {
        PyObject *longer = PyUnicode_FromFormat("%U%s%s", list, PyUnicode_GET_LENGTH(list) > 0 ? ", " : "", *kind);
        Py_SETREF(list, longer);
    }
    if (list != NULL) PyErr_Format(PyExc_ValueError, "Calibrator: unknown kind '%s'; there are: %U", name, list);
    Py_XDECREF(list);
    return NULL;
}

static PyObject *calibrator_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"kind", "axis", "option", NULL};
    const char *name = "max";
    PyObject *axis_object = NULL;
    long long option = 0;
    mq_calib_axis axis;
    mq_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|sOL:Calibrator", names, &name, &axis_object, &option)) return NULL;
    const mq_calib_kind *kind = mq_calib_find(name);
    if (kind == NULL) return unknown_kind(name);
    if (parse_axis(axis_object, &axis) < 0 || check_arguments(kind, &axis, option) < 0) return NULL;
    CalibratorObject *self = (CalibratorObject *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->calib = mq_calib_new(kind, axis, &err);
    if (self->calib != NULL) {
        self->calib->option = option;
        return (PyObject *)self;
    }
    Py_DECREF(self);
    return mq_raise(&err);
}

static void calibrator_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    mq_calib_free(calib_of(self));
    type->tp_free(self);
    Py_DECREF(type);
}

static int calibrator_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

PyDoc_STRVAR(collect_doc,
"collect($self, x, mask=None)\n--\n\n"
"Adds x, of any shape, float32, bfloat16 or float16.\n\n"
"mask: shape of x without its last axis; entries of 0 are padding and count nowhere.");

/* x as rows of its last axis, float32 or bfloat16. */
static int view_rows(mq_state *state, PyObject *x, mq_tensor *view, PyObject **keep)
{
    if (mq_view_contiguous(state, x, "x", view, keep) < 0) return -1;
    if (view->dtype == MQ_F32 || view->dtype == MQ_BF16) return 0;
    PyObject *array = *keep;
    *keep = NULL;
    int rc = mq_view_as(state, array, "x", MQ_F32, view, keep);
    Py_DECREF(array);
    return rc;
}

static int view_mask(mq_state *state, PyObject *mask, int64_t rows, mq_tensor *view, PyObject **keep)
{
    mq_tensor given;
    if (mask == NULL || mask == Py_None) return 0;
    PyObject *converted = mq_as_booleans(mask);
    if (converted == NULL) return -1;
    int rc = mq_view_contiguous(state, converted, "mask", &given, keep);
    Py_DECREF(converted);
    if (rc < 0) return -1;
    *view = given;
    if (mq_tensor_count(view) == rows) return 0;
    PyErr_Format(PyExc_ValueError, "mask: %lld entries for %lld rows of x", (long long)mq_tensor_count(view),
                 (long long)rows);
    return -1;
}

static PyObject *calibrator_collect(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "mask", NULL};
    PyObject *x_object, *mask_object = NULL, *x_keep = NULL, *mask_keep = NULL, *result = NULL;
    mq_state *state = mq_state_of_object(self);
    mq_tensor x, mask = {0};
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:collect", names, &x_object, &mask_object)) return NULL;
    if (view_rows(state, x_object, &x, &x_keep) < 0) return NULL;
    int64_t width = x.ndim > 0 ? x.shape[x.ndim - 1] : 1, rows = width > 0 ? mq_tensor_count(&x) / width : 0;
    if (view_mask(state, mask_object, rows, &mask, &mask_keep) < 0) goto done;
    mq_calib_rows data = {.x = x.data, .dtype = x.dtype, .rows = rows, .width = width, .ld = width, .mask = mask.data,
                          .group = -1};
    Py_BEGIN_ALLOW_THREADS
    rc = mq_calib_collect(calib_of(self), &data, &err);
    Py_END_ALLOW_THREADS
    result = rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
done:
    Py_XDECREF(x_keep);
    Py_XDECREF(mask_keep);
    return result;
}

PyDoc_STRVAR(compute_amax_doc,
"compute_amax($self)\n--\n\n"
"The amax: a float (axis None) or a float32 array with an entry per channel; None if nothing was collected.\n\n"
"ValueError if NaN or an infinity was among the data.");

static PyObject *calibrator_compute_amax(PyObject *self, PyObject *unused)
{
    mq_calib *calib = calib_of(self);
    int64_t channels = calib->channels;
    mq_tensor view;
    mq_error err;
    float amax;
    (void)unused;
    if (channels == 0) Py_RETURN_NONE;
    if (calib->axis == MQ_CALIB_TENSOR)
        return mq_calib_finish(calib, &amax, &err) == MQ_OK ? PyFloat_FromDouble((double)amax) : mq_raise(&err);
    PyObject *array = mq_new_array(mq_state_of_object(self), MQ_F32, 1, &channels, &view);
    if (array == NULL || mq_calib_finish(calib, view.data, &err) == MQ_OK) return array;
    Py_DECREF(array);
    return mq_raise(&err);
}

PyDoc_STRVAR(compute_range_doc,
"compute_range($self, method, num_bits=8, unsigned=False, stride=1, start_bin=128, percentile=99.99,\n"
"              skip_zeros=False)\n--\n\n"
"The amax that a histogram suggests, a float: method 'entropy', 'mse' or 'percentile'; None if nothing was\n"
"collected.\n\n"
"num_bits: of integers, 0 for FP8 E4M3. stride, start_bin: candidates of entropy and mse. ValueError if NaN or an\n"
"infinity was among the data, if there are fewer bins than start_bin, and for calibrators of another kind.");

static int parse_method(const char *name, mq_range_method *out)
{
    static const char *const methods[] = {
        [MQ_RANGE_ENTROPY] = "entropy", [MQ_RANGE_MSE] = "mse", [MQ_RANGE_PERCENTILE] = "percentile"};
    for (size_t i = 0; i < MQ_COUNT(methods); i++) {
        if (strcmp(name, methods[i]) != 0) continue;
        *out = (mq_range_method)i;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "compute_range: unknown method '%s'; there are: entropy, mse, percentile", name);
    return -1;
}

static PyObject *calibrator_compute_range(PyObject *self, PyObject *given, PyObject *kwargs)
{
    static char *names[] = {"method", "num_bits", "unsigned", "stride", "start_bin", "percentile", "skip_zeros", NULL};
    mq_range_args args = {.bits = 8, .stride = 1, .start_bin = 128, .percentile = 99.99};
    const char *method;
    long long stride = 1, start_bin = 128;
    int skip_zeros = 0, rc;
    mq_histogram histogram;
    mq_error err;
    float amax = 0.0f;
    if (!PyArg_ParseTupleAndKeywords(given, kwargs, "s|ipLLdp:compute_range", names, &method, &args.bits,
                                     &args.is_unsigned, &stride, &start_bin, &args.percentile, &skip_zeros) ||
        parse_method(method, &args.method) < 0)
        return NULL;
    args.stride = stride;
    args.start_bin = start_bin;
    if (calib_of(self)->kind == &mq_calib_histogram && calib_of(self)->channels == 0) Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_histogram_of(calib_of(self), skip_zeros, &histogram, &err);
    if (rc == MQ_OK) rc = mq_histogram_range(&histogram, &args, &amax, &err);
    mq_free(histogram.counts);
    Py_END_ALLOW_THREADS
    return rc == MQ_OK ? PyFloat_FromDouble((double)amax) : mq_raise(&err);
}

PyDoc_STRVAR(histogram_doc,
"histogram($self, skip_zeros=False)\n--\n\n"
"(counts, width): int64 counts of |x| in bins [i * width, (i + 1) * width); None if nothing was collected.");

static PyObject *calibrator_histogram(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"skip_zeros", NULL};
    mq_histogram histogram;
    mq_tensor view;
    mq_error err;
    int skip_zeros = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|p:histogram", names, &skip_zeros)) return NULL;
    if (calib_of(self)->kind == &mq_calib_histogram && calib_of(self)->channels == 0) Py_RETURN_NONE;
    if (mq_histogram_of(calib_of(self), skip_zeros, &histogram, &err) != MQ_OK) return mq_raise(&err);
    PyObject *array = mq_new_array(mq_state_of_object(self), MQ_I64, 1, &histogram.bins, &view);
    if (array != NULL) memcpy(view.data, histogram.counts, (size_t)histogram.bins * sizeof *histogram.counts);
    mq_free(histogram.counts);
    return array == NULL ? NULL : Py_BuildValue("Nd", array, histogram.width);
}

PyDoc_STRVAR(compute_gram_doc,
"compute_gram($self)\n--\n\n"
"X^T X of all rows, float32 [C, C], or its diagonal blocks [blocks, size, size]; None if nothing was collected.\n\n"
"ValueError if NaN or an infinity was among the data, and for calibrators of another kind.");

static PyObject *calibrator_compute_gram(PyObject *self, PyObject *unused)
{
    mq_calib *calib = calib_of(self);
    const int64_t n = calib->channels, size = calib->option;
    const int64_t whole[] = {n, n}, blocks[] = {size ? MQ_CEIL_DIV(n, size) : 0, size, size};
    mq_tensor view;
    mq_error err;
    int rc;
    (void)unused;
    if (calib->kind != &mq_calib_gram)
        return PyErr_Format(PyExc_ValueError, "a calibrator of kind %s has no Gram matrix", calib->kind->name);
    if (n == 0) Py_RETURN_NONE;
    PyObject *array = mq_new_array(mq_state_of_object(self), MQ_F32, size ? 3 : 2, size ? blocks : whole, &view);
    if (array == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_gram_finish(calib, view.data, &err);
    Py_END_ALLOW_THREADS
    return mq_result(array, rc, &err);
}

PyDoc_STRVAR(compute_bias_doc,
"compute_bias($self)\n--\n\n"
"The bias, a float32 array with an entry per channel; None if nothing was collected. ValueError for a kind without\n"
"one.");

static PyObject *calibrator_compute_bias(PyObject *self, PyObject *unused)
{
    mq_calib *calib = calib_of(self);
    mq_tensor view;
    mq_error err;
    (void)unused;
    if (calib->kind->bias != NULL && calib->channels == 0) Py_RETURN_NONE;
    PyObject *array = mq_new_array(mq_state_of_object(self), MQ_F32, 1, &calib->width, &view);
    if (array == NULL || mq_calib_bias(calib, view.data, &err) == MQ_OK) return array;
    Py_DECREF(array);
    return mq_raise(&err);
}

PyDoc_STRVAR(reset_doc, "reset($self)\n--\n\nForgets everything collected.");

static PyObject *calibrator_reset(PyObject *self, PyObject *unused)
{
    (void)unused;
    mq_calib_reset(calib_of(self));
    Py_RETURN_NONE;
}

PyDoc_STRVAR(merge_doc,
"merge($self, other)\n--\n\n"
"Adds the statistics of another Calibrator of the same kind and axis, as if its data had been collected here.");

static PyObject *calibrator_merge(PyObject *self, PyObject *other)
{
    mq_error err;
    if (Py_TYPE(other) != Py_TYPE(self))
        return PyErr_Format(PyExc_TypeError, "merge: expected a Calibrator, got %.100s", Py_TYPE(other)->tp_name);
    if (mq_calib_merge(calib_of(self), calib_of(other), &err) != MQ_OK) return mq_raise(&err);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(save_doc, "save($self)\n--\n\nThe statistics as bytes, for load.");

static PyObject *calibrator_save(PyObject *self, PyObject *unused)
{
    mq_error err;
    (void)unused;
    if (mq_calib_settle(calib_of(self), 1, &err) != MQ_OK) return mq_raise(&err);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)mq_calib_save_nbytes(calib_of(self)));
    if (bytes != NULL) mq_calib_save(calib_of(self), (uint8_t *)PyBytes_AsString(bytes));
    return bytes;
}

PyDoc_STRVAR(load_doc,
"load($self, state)\n--\n\n"
"Replaces the statistics by those that save() of a Calibrator of the same kind and axis gave; ValueError\n"
"otherwise.");

static PyObject *calibrator_load(PyObject *self, PyObject *state)
{
    char *bytes;
    Py_ssize_t length;
    mq_error err;
    if (PyBytes_AsStringAndSize(state, &bytes, &length) < 0) return NULL;
    if (mq_calib_load(calib_of(self), (const uint8_t *)bytes, (size_t)length, &err) != MQ_OK) return mq_raise(&err);
    Py_RETURN_NONE;
}

static PyObject *calibrator_count(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(calib_of(self)->count);
}

static PyObject *calibrator_kind(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(calib_of(self)->kind->name);
}

static PyObject *calibrator_axis(PyObject *self, void *unused)
{
    (void)unused;
    if (calib_of(self)->axis == MQ_CALIB_TENSOR) Py_RETURN_NONE;
    return PyLong_FromLong(-1);
}

static PyObject *calibrator_option(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(calib_of(self)->option);
}

static PyMethodDef methods[] = {
    {"collect", (PyCFunction)(void (*)(void))calibrator_collect, METH_VARARGS | METH_KEYWORDS, collect_doc},
    {"compute_amax", calibrator_compute_amax, METH_NOARGS, compute_amax_doc},
    {"compute_range", (PyCFunction)(void (*)(void))calibrator_compute_range, METH_VARARGS | METH_KEYWORDS,
     compute_range_doc},
    {"histogram", (PyCFunction)(void (*)(void))calibrator_histogram, METH_VARARGS | METH_KEYWORDS, histogram_doc},
    {"compute_gram", calibrator_compute_gram, METH_NOARGS, compute_gram_doc},
    {"compute_bias", calibrator_compute_bias, METH_NOARGS, compute_bias_doc},
    {"reset", calibrator_reset, METH_NOARGS, reset_doc},
    {"merge", calibrator_merge, METH_O, merge_doc},
    {"save", calibrator_save, METH_NOARGS, save_doc},
    {"load", calibrator_load, METH_O, load_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"count", calibrator_count, NULL, "Rows (tokens) seen, padding left out.", NULL},
    {"kind", calibrator_kind, NULL, "The kind of statistics.", NULL},
    {"option", calibrator_option, NULL, "The kind's own parameter.", NULL},
    {"axis", calibrator_axis, NULL, "None, or -1 for one value per channel.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)calibrator_doc}, {Py_tp_new, calibrator_new}, {Py_tp_dealloc, calibrator_dealloc},
    {Py_tp_traverse, calibrator_traverse}, {Py_tp_methods, methods}, {Py_tp_getset, properties}, {0, NULL},
};

static PyType_Spec spec = {
    .name = "modelq._core.Calibrator", .basicsize = sizeof(CalibratorObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, .slots = slots,
};

static int calibrator_init(PyObject *module, mq_state *state)
{
    state->calibrator_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->calibrator_type ? PyModule_AddType(module, state->calibrator_type) : -1;
}

const mq_py_part mq_py_calibrator = {.init = calibrator_init};
