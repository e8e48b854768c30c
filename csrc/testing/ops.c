/* The operations of the runtime on arrays, and the row operations of each ISA's table. */
#include "testing/operands.h"

#include <string.h>

#include "kernels/row_ops.h"

static int apply(const char *name, mq_operands *set, double number, mq_error *err)
{
    mq_tensor *x = &set->view[0];
    mq_row_sizes sizes = mq_rows_of(x);
    if (strcmp(name, "rmsnorm") == 0) {
        mq_rmsnorm_forward(x->data, set->view[1].data, set->view[2].data, number, &sizes);
    } else if (strcmp(name, "swiglu") == 0) {
        mq_swiglu_forward(x->data, set->view[1].data, &sizes);
    } else if (strcmp(name, "add") == 0) {
        mq_add_forward(x->data, set->view[1].data, &sizes);
    } else if (strcmp(name, "embed") == 0) {
        mq_embed_forward(x->data, set->view[1].data, &set->view[2], &sizes);
    } else {
        return mq_fail(err, MQ_ERR_VALUE, "no operation %s", name);
    }
    return MQ_OK;
}

PyDoc_STRVAR(apply_op_doc,
"apply_op(name, operands, number=0.0)\n--\n\n"
"rmsnorm(out, in, weight; eps), swiglu(gate, up), add(x, y) or embed(out, ids, weight): the first operand is written.");

static PyObject *apply_op(PyObject *module, PyObject *args)
{
    const char *name;
    PyObject *tuple, *result = NULL;
    double number = 0.0;
    mq_operands set;
    mq_error err;
    if (!PyArg_ParseTuple(args, "sO!|d:apply_op", &name, &PyTuple_Type, &tuple, &number)) return NULL;
    if (mq_operands_take_all(&set, mq_state_of(module), tuple) == 0)
        result = apply(name, &set, number, &err) == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
    mq_operands_release(&set);
    return result;
}

PyDoc_STRVAR(apply_rope_doc,
"apply_rope(x, theta, kind, numbers)\n--\n\n"
"Rotates x [T, heads, D] in place, positions from 0. kind: 0 default, 1 linear, 2 llama3; numbers: (factor,\n"
"low, high, original positions).");

static PyObject *apply_rope(PyObject *module, PyObject *args)
{
    PyObject *tuple;
    mq_config config = {.partial_rotary_factor = 1.0, .rope_attention_factor = 1.0};
    mq_rope_table table = {0};
    mq_operands set;
    mq_error err;
    if (!PyArg_ParseTuple(args, "O!di(dddL):apply_rope", &PyTuple_Type, &tuple, &config.rope_theta, &config.rope_type,
                          &config.rope_factor, &config.rope_low_freq_factor, &config.rope_high_freq_factor,
                          &config.rope_original_max_position_embeddings))
        return NULL;
    PyObject *result = NULL;
    if (mq_operands_take_all(&set, mq_state_of(module), tuple) < 0) goto done;
    const mq_tensor *x = &set.view[0];
    mq_rope_sizes sizes = {.tokens = x->shape[0], .heads = x->shape[1], .head_dim = x->shape[2], .dtype = x->dtype};
    config.head_dim = sizes.head_dim;
    if (mq_rope_table_init(&table, &config, MQ_ROPE_MAIN, sizes.tokens, &err) == MQ_OK) {
        mq_rope_forward(x->data, &table, &sizes);
        result = Py_NewRef(Py_None);
    } else {
        mq_raise(&err);
    }
    mq_rope_table_free(&table);
done:
    mq_operands_release(&set);
    return result;
}

PyDoc_STRVAR(row_amax_doc,
"row_amax(x, isa)\n--\n\n"
"The bits of the largest magnitude in x, by the table of one ISA (0 c, 1 avx2, 2 avx512); None if it cannot run here.");

static PyObject *row_amax(PyObject *module, PyObject *args)
{
    PyObject *object, *result = NULL;
    int isa;
    mq_operands set = {.count = 0};
    if (!PyArg_ParseTuple(args, "Oi:row_amax", &object, &isa)) return NULL;
    if (isa < 0 || isa >= MQ_ISA_COUNT || !mq_isa_supported((mq_isa)isa)) Py_RETURN_NONE;
    if (mq_operands_take(&set, mq_state_of(module), object) == 0) {
        const mq_row_ops *table = mq_row_ops_table_of((mq_isa)isa);
        const mq_typed_row_ops *ops = set.view[0].dtype == MQ_BF16 ? &table->bf16 : &table->f32;
        result = PyLong_FromUnsignedLong(ops->amax(set.view[0].data, mq_tensor_count(&set.view[0])));
    }
    mq_operands_release(&set);
    return result;
}

static PyMethodDef methods[] = {
    {"apply_op", apply_op, METH_VARARGS, apply_op_doc},
    {"apply_rope", apply_rope, METH_VARARGS, apply_rope_doc},
    {"row_amax", row_amax, METH_VARARGS, row_amax_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_testing_ops = {.methods = methods};
