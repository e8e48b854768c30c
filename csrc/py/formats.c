/* The tables of formats and schemes as read-only mappings, and the codec on arrays. */
#include "py/convert.h"
#include "py/ndarray.h"

#include "core/pool.h"
#include "format/format.h"
#include "format/pack.h"
#include "kernels/kernels.h"

static const char *const kind_names[] = {"float", "int", "scale"};
static const char *const special_names[] = {"none", "fn", "ieee"};
static const char *const rounding_names[] = {"nearest_even", "up", "ties_down"};
static const char *const packing_names[] = {"none", "row", "row_pairs"};
static const char *const activation_names[] = {NULL, "same", "fp8", "fp8_token", "int8"};

/* Takes row; puts a read-only view of it into table under name. */
static int add_row(PyObject *table, const char *name, PyObject *row)
{
    if (row == NULL) return -1;
    PyObject *view = PyDictProxy_New(row);
    Py_DECREF(row);
    if (view == NULL) return -1;
    int rc = PyDict_SetItemString(table, name, view);
    Py_DECREF(view);
    return rc;
}

static PyObject *read_only(PyObject *table)
{
    PyObject *view = PyDictProxy_New(table);
    Py_DECREF(table);
    return view;
}

/* How configurations spell the format: (exponent bits, mantissa bits), or a number of bits. */
static PyObject *num_bits(mq_codec c)
{
    if (c.kind == MQ_KIND_INT) return PyLong_FromLong(c.bits);
    return Py_BuildValue("(ii)", c.exponent_bits, c.mantissa_bits);
}

static PyObject *format_row(mq_format format)
{
    const mq_format_row *row = mq_format_get(format);
    const mq_codec c = row->codec;
    return Py_BuildValue("{s:s,s:s,s:i,s:i,s:i,s:i,s:O,s:s,s:s,s:O,s:d,s:d,s:d,s:z,s:z,s:i,s:s,s:N}",
                         "name", row->name, "kind", kind_names[c.kind], "bits", c.bits,
                         "exponent_bits", c.exponent_bits, "mantissa_bits", c.mantissa_bits,
                         "bias", c.bias, "signed", c.is_signed ? Py_True : Py_False,
                         "special", special_names[c.special], "rounding", rounding_names[c.rounding],
                         "saturates", c.overflow == MQ_OVERFLOW_SATURATE ? Py_True : Py_False,
                         "max", (double)mq_format_max(format),
                         "smallest_normal", (double)mq_format_smallest_normal(format),
                         "smallest", (double)mq_format_smallest(format), "dtype", row->dtype,
                         "safetensors", row->safetensors, "dlpack", row->dlpack,
                         "compressed_type", row->compressed_type, "num_bits", num_bits(c));
}

PyDoc_STRVAR(formats_doc,
"formats()\n--\n\n"
"The element formats by name: a read-only mapping of read-only rows (csrc/format/formats.def).");

static PyObject *formats(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *table = PyDict_New();
    for (int i = 0; table != NULL && i < MQ_FMT_COUNT; i++)
        if (add_row(table, mq_format_get((mq_format)i)->name, format_row((mq_format)i)) < 0) Py_CLEAR(table);
    return table != NULL ? read_only(table) : NULL;
}

/* Element bits and the block scale's share; scales per row or tensor are not counted. */
static double bits_per_weight(const mq_scheme_row *row)
{
    double bits = mq_format_get(row->element)->codec.bits;
    if (row->block_rows > 0 && row->block_cols > 0)
        bits += mq_format_get(row->scale)->codec.bits / ((double)row->block_rows * row->block_cols);
    return bits;
}

static PyObject *scheme_row(mq_scheme scheme)
{
    const mq_scheme_row *row = mq_scheme_get(scheme);
    const mq_format_row *element = mq_format_get(row->element), *scale = mq_format_get(row->scale);
    PyObject *second = Py_NewRef(Py_None);
    if (row->second_divisor != 0.0f) Py_SETREF(second, PyFloat_FromDouble((double)row->second_divisor));
    return Py_BuildValue("{s:s,s:s,s:N,s:(ii),s:s,s:N,s:s,s:z,s:d,s:s,s:s,s:z,s:z,s:z,s:z,s:z,s:z,s:z,s:z}",
                         "name", row->name, "element", element->name, "num_bits", num_bits(element->codec),
                         "block", row->block_rows, row->block_cols, "scale", scale->name, "second_divisor", second,
                         "packing", packing_names[row->packing], "activations", activation_names[row->activations],
                         "bits_per_weight", bits_per_weight(row),
                         "weight_dtype", row->packing != MQ_PACK_NONE ? "uint8" : element->dtype,
                         "scale_dtype", scale->dtype, "modelopt", row->modelopt,
                         "modelopt_weight_only", row->modelopt_weight_only,
                         "modelopt_fp8_input", row->modelopt_fp8_input,
                         "compressed_tensors", row->compressed_tensors,
                         "compressed_tensors_weight_only", row->compressed_tensors_weight_only, "autoawq", row->autoawq,
                         "gptq", row->gptq, "fp8", row->fp8);
}

PyDoc_STRVAR(schemes_doc,
"schemes()\n--\n\n"
"The block schemes by name: a read-only mapping of read-only rows (csrc/format/schemes.def).\n\n"
"block is (rows, columns) that share a scale, 0 = the whole extent. The keys modelopt, modelopt_weight_only,\n"
"modelopt_fp8_input, compressed_tensors, compressed_tensors_weight_only, autoawq, gptq and fp8 hold what an export\n"
"dialect calls the scheme, None where it has no word for it.");

static PyObject *schemes(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *table = PyDict_New();
    for (int i = 0; table != NULL && i < MQ_SCHEME_COUNT; i++)
        if (add_row(table, mq_scheme_get((mq_scheme)i)->name, scheme_row((mq_scheme)i)) < 0) Py_CLEAR(table);
    return table != NULL ? read_only(table) : NULL;
}

/* ---- encode, decode ---- */

static int parse_format(const char *name, mq_format *out)
{
    if (mq_format_find(name, out) == MQ_OK) return 0;
    PyErr_Format(PyExc_ValueError, "unknown format '%s'; modelq._core.formats() lists them", name);
    return -1;
}

static mq_dtype code_dtype(mq_format format)
{
    const int bits = mq_format_get(format)->codec.bits;
    return bits <= 8 ? MQ_U8 : bits <= 16 ? MQ_U16 : MQ_U32;
}

typedef struct codec_job {
    const char *from;
    char *to;
    size_t from_size, to_size;
    void (*encode)(const float *x, int64_t n, void *codes);
    void (*decode)(const void *codes, int64_t n, float *y);
} codec_job;

static void run_codec(void *arg, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const codec_job *job = arg;
    const char *from = job->from + (size_t)begin * job->from_size;
    char *to = job->to + (size_t)begin * job->to_size;
    if (job->encode != NULL) job->encode((const float *)(const void *)from, end - begin, to);
    else job->decode(from, end - begin, (float *)(void *)to);
}

static PyObject *map_codes(mq_state *state, PyObject *input, mq_dtype from, mq_dtype to, codec_job job)
{
    mq_tensor in, out;
    PyObject *keep = NULL;
    if (mq_view_as(state, input, job.encode != NULL ? "values" : "codes", from, &in, &keep) < 0) return NULL;
    PyObject *result = mq_new_array(state, to, in.ndim, in.shape, &out);
    if (result != NULL) {
        job.from = in.data;
        job.to = out.data;
        job.from_size = mq_dtype_size(from);
        job.to_size = mq_dtype_size(to);
        Py_BEGIN_ALLOW_THREADS
        mq_parallel_for(mq_tensor_count(&in), 1 << 16, run_codec, &job);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(keep);
    return result;
}

PyDoc_STRVAR(encode_doc,
"encode(values, format)\n--\n\n"
"One code per element of values (taken as float32): uint8, uint16 or uint32 of the same shape.\n\n"
"Rounds to nearest, ties to even (e8m0: up to the next power of two). Formats of 8 bits and fewer saturate,\n"
"infinity too; NaN becomes the format's NaN, or the largest value where it has none (0 for integers).");

static PyObject *encode(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"values", "format", NULL};
    PyObject *values;
    const char *name;
    mq_format format;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os:encode", names, &values, &name)) return NULL;
    if (parse_format(name, &format) < 0) return NULL;
    return map_codes(mq_state_of(module), values, MQ_F32, code_dtype(format),
                     (codec_job){.encode = mq_kernels_get()->encode[format]});
}

PyDoc_STRVAR(decode_doc,
"decode(codes, format)\n--\n\n"
"float32 values of codes as encode() makes them. Bits above the format's width must be 0.");

static PyObject *decode(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"codes", "format", NULL};
    PyObject *codes;
    const char *name;
    mq_format format;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os:decode", names, &codes, &name)) return NULL;
    if (parse_format(name, &format) < 0) return NULL;
    return map_codes(mq_state_of(module), codes, code_dtype(format), MQ_F32,
                     (codec_job){.decode = mq_kernels_get()->decode[format]});
}

static PyMethodDef methods[] = {
    {"formats", formats, METH_NOARGS, formats_doc},
    {"schemes", schemes, METH_NOARGS, schemes_doc},
    {"encode", (PyCFunction)(void (*)(void))encode, METH_VARARGS | METH_KEYWORDS, encode_doc},
    {"decode", (PyCFunction)(void (*)(void))decode, METH_VARARGS | METH_KEYWORDS, decode_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_py_formats = {.methods = methods};
