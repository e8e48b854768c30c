/* GramLoss: a Gram matrix made ready to say what changes of a weight lose (csrc/calib/gram_loss.h). */
#include "py/type_gram_loss.h"

#include "py/convert.h"
#include "py/ndarray.h"

typedef struct GramLossObject {
    PyObject_HEAD
    mq_gram_loss loss;
} GramLossObject;

int mq_gram_loss_of(mq_state *state, PyObject *object, const mq_gram_loss **out)
{
    *out = NULL;
    if (object == NULL || object == Py_None) return 0;
    if (!Py_IS_TYPE(object, state->gram_loss_type)) {
        PyErr_Format(PyExc_TypeError, "gram: expected a GramLoss or None, got %s", Py_TYPE(object)->tp_name);
        return -1;
    }
    *out = &((GramLossObject *)object)->loss;
    return 0;
}

static int parse_compute(const char *name, mq_gemm_kind *out)
{
    if (PyOS_stricmp(name, "bfloat16") == 0) *out = MQ_GEMM_BF16;
    else if (PyOS_stricmp(name, "float32") == 0) *out = MQ_GEMM_F32;
    else {
        PyErr_Format(PyExc_ValueError, "compute: expected bfloat16 or float32, got '%s'", name);
        return -1;
    }
    return 0;
}

static int check_shape(const mq_tensor *gram, long long columns)
{
    const int whole = gram->ndim == 2 && gram->shape[0] == gram->shape[1];
    const int blocks = gram->ndim == 3 && gram->shape[1] == gram->shape[2] && gram->shape[1] > 0 && columns >= 0 &&
                       MQ_CEIL_DIV((int64_t)columns, gram->shape[1]) == gram->shape[0];
    char text[96];
    if (whole || blocks) return 0;
    PyErr_Format(PyExc_ValueError, "gram: expected [n, n], or [blocks, size, size] and the number of columns, got %s",
                 mq_tensor_describe(gram, text, sizeof text));
    return -1;
}

static PyObject *gram_loss_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gram", "compute", "columns", NULL};
    const char *compute = "float32";
    long long columns = -1;
    PyObject *object, *keep = NULL;
    mq_tensor gram;
    mq_gemm_kind kind;
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|sL:GramLoss", names, &object, &compute, &columns)) return NULL;
    if (parse_compute(compute, &kind) < 0) return NULL;
    GramLossObject *self = (GramLossObject *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    if (mq_view_as(mq_state_of_object((PyObject *)self), object, "gram", MQ_F32, &gram, &keep) < 0 ||
        check_shape(&gram, columns) < 0)
        goto failed;
    Py_BEGIN_ALLOW_THREADS
    rc = gram.ndim == 2 ? mq_gram_loss_init(&self->loss, gram.data, gram.shape[0], 0, kind, &err)
                        : mq_gram_loss_init(&self->loss, gram.data, columns, gram.shape[1], kind, &err);
    Py_END_ALLOW_THREADS
    if (rc != MQ_OK) mq_raise(&err);
    if (rc == MQ_OK) {
        Py_DECREF(keep);
        return (PyObject *)self;
    }
failed:
    Py_XDECREF(keep);
    Py_DECREF(self);
    return NULL;
}

static void gram_loss_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    mq_gram_loss_free(&((GramLossObject *)self)->loss);
    type->tp_free(self);
    Py_DECREF(type);
}

static int gram_loss_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static PyObject *columns_get(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((GramLossObject *)self)->loss.n);
}

static PyObject *blocks_get(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((GramLossObject *)self)->loss.blocks);
}

PyDoc_STRVAR(gram_loss_doc,
"GramLoss(gram, compute='float32', columns=-1)\n--\n\n"
"A Gram matrix H = X^T X of a linear's inputs, made ready to say what a change d of a row of its weight loses:\n"
"d H d^T, which is the squared change of its outputs over all tokens X.\n\n"
"gram: float32 [n, n], symmetric, or the blocks on its diagonal [ceil(columns / size), size, size] as\n"
"Calibrator.compute_gram gives them. compute 'bfloat16': H and d are rounded to bfloat16, sums are float32.");

static PyGetSetDef getset[] = {
    {"columns", columns_get, NULL, "Columns of the weights that it speaks of.", NULL},
    {"blocks", blocks_get, NULL, "Blocks on its diagonal, 1 if it is whole.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)gram_loss_doc}, {Py_tp_new, gram_loss_new}, {Py_tp_dealloc, gram_loss_dealloc},
    {Py_tp_traverse, gram_loss_traverse}, {Py_tp_getset, getset}, {0, NULL},
};

static PyType_Spec spec = {
    .name = "modelq._core.GramLoss",
    .basicsize = sizeof(GramLossObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

static int gram_loss_init(PyObject *module, mq_state *state)
{
    state->gram_loss_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->gram_loss_type != NULL ? PyModule_AddType(module, state->gram_loss_type) : -1;
}

const mq_py_part mq_py_gram_loss = {.init = gram_loss_init};
