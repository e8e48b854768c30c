/* repack_int4: from one checkpoint's layout of INT4 codes to another's. */
#include "py/convert.h"
#include "py/ndarray.h"

#include "quant/repack.h"

static int parse_layout(const char *name, mq_int4_layout *out)
{
    if (mq_int4_layout_find(name, out) == MQ_OK) return 0;
    PyErr_Format(PyExc_ValueError, "unknown layout '%s'; known are row_pairs, int32_row, awq, gptq", name);
    return -1;
}

static PyObject *repack_view(mq_state *state, mq_int4_layout from, const mq_tensor *in, mq_int4_layout to)
{
    mq_tensor wanted, out;
    mq_error err;
    int64_t shape[2];
    char have[96], expected[96];
    if (in->ndim != 2) return PyErr_Format(PyExc_ValueError, "packed: expected 2 dimensions, got %d", in->ndim);
    mq_int4_matrix_shape(from, in->shape, shape);
    if (mq_int4_packed(from, shape[0], shape[1], &wanted, &err) != MQ_OK) return mq_raise(&err);
    if (in->dtype != wanted.dtype)
        return PyErr_Format(PyExc_TypeError, "packed: expected %s, got %s",
                            mq_tensor_describe(&wanted, expected, sizeof expected),
                            mq_tensor_describe(in, have, sizeof have));
    if (mq_int4_packed(to, shape[0], shape[1], &wanted, &err) != MQ_OK) return mq_raise(&err);
    PyObject *result = mq_new_array(state, wanted.dtype, 2, wanted.shape, &out);
    if (result == NULL) return NULL;
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_int4_repack(from, in, to, &out, &err);
    Py_END_ALLOW_THREADS
    return mq_result(result, rc, &err);
}

PyDoc_STRVAR(repack_int4_doc,
"repack_int4(packed, source, target)\n--\n\n"
"INT4 codes of an [out, in] matrix in another layout: 'row_pairs' (uint8 [out/2, in], signed; what quantize() makes),\n"
"'int32_row' (int32 [out, in/8], compressed-tensors), 'awq' (int32 [in, out/8], AutoAWQ gemm) or 'gptq' (int32\n"
"[in/8, out]); the last three store the code plus 8. ValueError where out or in is no multiple of what a layout packs\n"
"together.");

static PyObject *repack_int4(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"packed", "source", "target", NULL};
    mq_state *state = mq_state_of(module);
    PyObject *object, *keep = NULL;
    const char *source, *target;
    mq_int4_layout from, to;
    mq_tensor in;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oss:repack_int4", names, &object, &source, &target)) return NULL;
    if (parse_layout(source, &from) < 0 || parse_layout(target, &to) < 0) return NULL;
    if (mq_view_contiguous(state, object, "packed", &in, &keep) < 0) return NULL;
    PyObject *result = repack_view(state, from, &in, to);
    Py_DECREF(keep);
    return result;
}

static PyMethodDef methods[] = {
    {"repack_int4", (PyCFunction)(void (*)(void))repack_int4, METH_VARARGS | METH_KEYWORDS, repack_int4_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_py_repack = {.methods = methods};
