/* The backward of the runtime's operations, on arrays. */
#include "testing/operands.h"

#include <string.h>

#include "core/alloc.h"
#include "model/attention.h"

static int back_linear(const mq_operands *set, double number, mq_error *err)
{
    const mq_tensor *view = set->view;
    mq_packed packed = {.data = NULL};
    int rc = mq_linear_load_backward(&packed, &view[2], MQ_GEMM_F32, "weight", err);
    if (rc == MQ_OK) mq_linear_backward(view[0].data, view[1].data, &packed, number != 0.0, view[0].shape[0]);
    mq_free(packed.data);
    return rc;
}

/* (logits, labels, factors, losses): logits become gradients, losses are written. Columns come in two slices. */
static int back_loss(const mq_operands *set, mq_error *err)
{
    const mq_tensor *view = set->view;
    const int64_t rows = view[0].shape[0], columns = view[0].shape[1], half = columns / 2;
    mq_loss_row *losses = mq_alloc_array((size_t)rows, sizeof *losses);
    float *logits = view[0].data;
    if (losses == NULL) return mq_fail_memory(err, "losses", (size_t)rows * sizeof *losses);
    const mq_loss_slice first = {.rows = rows, .columns = half, .ld = columns};
    const mq_loss_slice second = {.rows = rows, .first = half, .columns = columns - half, .ld = columns};
    mq_loss_begin(losses, rows);
    mq_loss_forward(losses, logits, view[1].data, &first);
    mq_loss_forward(losses, logits + half, view[1].data, &second);
    for (int64_t i = 0; i < rows; i++) ((double *)view[3].data)[i] = mq_loss_of(&losses[i]);
    for (int64_t i = 0; i < rows; i++)
        if (((const int32_t *)view[1].data)[i] < 0) ((double *)view[3].data)[i] = 0.0;
    mq_loss_backward(logits, losses, view[1].data, view[2].data, &first);
    mq_loss_backward(logits + half, losses, view[1].data, view[2].data, &second);
    mq_free(losses);
    return MQ_OK;
}

/* (d_logits, d_shares, logits, experts, shares): the last two are written. */
static int back_route(const mq_operands *set, double number)
{
    const mq_tensor *view = set->view;
    const mq_routes routes = {.experts = view[3].data, .shares = view[4].data, .top_k = view[3].shape[1]};
    const mq_route_sizes sizes = {.rows = view[2].shape[0], .experts = view[2].shape[1], .dtype = view[2].dtype,
                                  .normalize = number != 0.0};
    mq_route_forward(&routes, view[2].data, &sizes);
    mq_route_backward(view[0].data, view[1].data, &routes, view[2].data, &sizes);
    return MQ_OK;
}

static int back_rope(const mq_operands *set, double theta, mq_error *err)
{
    const mq_tensor *x = &set->view[0];
    const mq_config config = {.partial_rotary_factor = 1.0, .rope_attention_factor = 1.0,
                              .rope_theta = theta, .head_dim = x->shape[2]};
    const mq_rope_sizes sizes = {.tokens = x->shape[0], .heads = x->shape[1], .head_dim = x->shape[2]};
    mq_rope_table table;
    int rc = mq_rope_table_init(&table, &config, MQ_ROPE_MAIN, sizes.tokens, err);
    if (rc == MQ_OK) mq_rope_backward(x->data, &table, &sizes);
    mq_rope_table_free(&table);
    return rc;
}

static int apply(const char *name, const mq_operands *set, double number, mq_error *err)
{
    const mq_tensor *view = set->view;
    const mq_row_sizes first = mq_rows_of(&view[1]), second = mq_rows_of(&view[2]), third = mq_rows_of(&view[3]);
    if (strcmp(name, "linear") == 0) return back_linear(set, number, err);
    if (strcmp(name, "loss") == 0) return back_loss(set, err);
    if (strcmp(name, "route") == 0) return back_route(set, number);
    if (strcmp(name, "rope") == 0) return back_rope(set, number, err);
    if (strcmp(name, "linear_weight") == 0)
        return mq_linear_weight_backward(view[0].data, view[1].data, view[2].data, first.width, &second, err);
    if (strcmp(name, "rmsnorm") == 0) {
        mq_rmsnorm_backward(view[0].data, view[1].data, view[2].data, view[3].data, number, 1, &second);
    } else if (strcmp(name, "rmsnorm_in_place") == 0) {
        mq_rmsnorm_backward(view[0].data, view[0].data, view[1].data, view[2].data, number, 0, &first);
    } else if (strcmp(name, "rmsnorm_weight") == 0) {
        mq_rmsnorm_weight_backward(view[0].data, view[1].data, view[2].data, number, &second);
    } else if (strcmp(name, "swiglu") == 0) {
        mq_swiglu_backward(view[0].data, view[1].data, view[2].data, view[3].data, &second);
    } else if (strcmp(name, "bias") == 0) {
        mq_bias_backward(view[0].data, view[1].data, first.rows, first.width);
    } else if (strcmp(name, "embed") == 0) {
        mq_embed_backward(view[0].data, view[1].data, view[2].data, &first);
    } else if (strcmp(name, "gather") == 0) {
        mq_gather_backward(view[0].data, view[1].data, view[2].data, &first);
    } else if (strcmp(name, "scatter") == 0) {
        const mq_scatter_gradient gradient = {.d_in = view[0].data, .d_shares = view[1].data};
        mq_scatter_backward(&gradient, view[2].data, view[3].data, view[4].data, view[5].data, &third);
    } else {
        return mq_fail(err, MQ_ERR_VALUE, "no operation %s", name);
    }
    return MQ_OK;
}

PyDoc_STRVAR(backward_op_doc,
"backward_op(name, operands, number=0.0)\n--\n\n"
"rmsnorm(d_in, d_out, in, weight; eps), rmsnorm_in_place(d, in, weight; eps),\n"
"rmsnorm_weight(d_weight, d_out, in; eps), swiglu(d_gate, d_up, gate, up), rope(d_x; theta),\n"
"linear(d_in, d_out, weight; accumulate), linear_weight(d_weight, d_out, in), bias(d_bias, d_out),\n"
"embed(d_weight, d_out, ids),\n"
"loss(logits, labels, factors, losses), route(d_logits, d_shares, logits, experts, shares; normalize),\n"
"scatter(d_in, d_shares, d_out, in, index, shares) or gather(d_in, d_out, index).");

static PyObject *backward_op(PyObject *module, PyObject *args)
{
    const char *name;
    PyObject *tuple, *result = NULL;
    double number = 0.0;
    mq_operands set;
    mq_error err;
    if (!PyArg_ParseTuple(args, "sO!|d:backward_op", &name, &PyTuple_Type, &tuple, &number)) return NULL;
    if (mq_operands_take_all(&set, mq_state_of(module), tuple) == 0) {
        /* Those that are not given look like the last. */
        for (int i = set.count; i < MQ_MOST_OPERANDS; i++) set.view[i] = set.view[set.count - 1];
        result = apply(name, &set, number, &err) == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
    }
    mq_operands_release(&set);
    return result;
}

PyDoc_STRVAR(attention_backward_doc,
"attention_backward(operands, scale, window=0)\n--\n\n"
"Causal attention and its gradients. operands: d_q, d_k, d_v, d_out, q, k, v, out and optionally a mask (uint8) and\n"
"behind it sinks and d_sinks [heads]; [tokens, heads, size] each, the first three and out are written, d_sinks is\n"
"added to.");

static PyObject *attention_backward(PyObject *module, PyObject *args)
{
    PyObject *tuple, *result = NULL;
    double scale;
    long long window = 0;
    mq_operands set;
    if (!PyArg_ParseTuple(args, "O!d|L:attention_backward", &PyTuple_Type, &tuple, &scale, &window)) return NULL;
    if (mq_operands_take_all(&set, mq_state_of(module), tuple) < 0) goto done;
    const mq_tensor *view = set.view, *q = &view[4], *k = &view[5], *v = &view[6];
    mq_attention_args call = {
        .T = q->shape[0], .T_kv = k->shape[0], .heads = q->shape[1], .kv_heads = k->shape[1], .head_dim = q->shape[2],
        .value_dim = v->shape[2], .q = q->data, .k = k->data, .v = v->data, .dtype = q->dtype,
        .ldq = q->shape[1] * q->shape[2], .ldk = k->shape[1] * k->shape[2], .ldv = v->shape[1] * v->shape[2],
        .out = view[7].data, .ldo = q->shape[1] * v->shape[2], .scale = (float)scale, .window = window,
        .key_mask = set.count > 8 ? view[8].data : NULL, .sinks = set.count > 10 ? view[9].data : NULL,
    };
    const mq_attention_gradient gradient = {.d_out = view[3].data, .d_q = view[0].data, .d_k = view[1].data,
                                            .d_v = view[2].data,
                                            .d_sinks = set.count > 10 ? view[10].data : NULL};
    void *scratch = mq_alloc(MQ_MAX(mq_attention_scratch(&call), mq_attention_backward_scratch(&call)));
    call.maxima = mq_alloc_array((size_t)(call.heads * call.T), 2 * sizeof(float));
    if (scratch == NULL || call.maxima == NULL) {
        PyErr_NoMemory();
    } else {
        call.factors = call.maxima + call.heads * call.T;
        mq_attention_forward(&call, scratch);
        mq_attention_backward(&gradient, &call, scratch);
        result = Py_NewRef(Py_None);
    }
    mq_free(call.maxima);
    mq_free(scratch);
done:
    mq_operands_release(&set);
    return result;
}

static PyMethodDef methods[] = {
    {"backward_op", backward_op, METH_VARARGS, backward_op_doc},
    {"attention_backward", attention_backward, METH_VARARGS, attention_backward_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_testing_backward = {.methods = methods};
