/* archs(): the table of model families, for the Python side that reads config.json. */
#include "py/runtime.h"

#include <string.h>

/* "a,b" as ["a", "b"]. */
static PyObject *split(const char *text)
{
    PyObject *string = PyUnicode_FromString(text);
    PyObject *comma = PyUnicode_FromString(",");
    PyObject *list = string && comma ? PyUnicode_Split(string, comma, -1) : NULL;
    Py_XDECREF(string);
    Py_XDECREF(comma);
    return list;
}

static int append(PyObject *list, PyObject *item)
{
    int rc = item ? PyList_Append(list, item) : -1;
    Py_XDECREF(item);
    return rc;
}

static PyObject *flag_list(unsigned flags)
{
    PyObject *list = PyList_New(0);
    for (unsigned bit = 1; list != NULL && mq_family_flag_name(bit) != NULL; bit <<= 1)
        if ((flags & bit) && append(list, PyUnicode_FromString(mq_family_flag_name(bit))) < 0) Py_CLEAR(list);
    return list;
}

static int may_hold(const mq_family *family, mq_condition condition)
{
    static const mq_config all[2] = {
        {.attention_bias = 1, .mlp_bias = 1, .qkv_bias = 1, .shared_intermediate_size = 1},
        {.attention_bias = 1, .mlp_bias = 1, .qkv_bias = 1, .shared_intermediate_size = 1, .q_lora_rank = 1},
    };
    const int moe = (family->flags & MQ_FAMILY_MOE) != 0, blocks = (family->flags & MQ_FAMILY_BLOCKS) != 0;
    const mq_layer_kind kinds[] = {{.experts = 0}, {.experts = moe},
                                   {.attention = blocks ? MQ_BLOCK_LINEAR : MQ_BLOCK_FULL,
                                    .mlp = blocks ? MQ_BLOCK_LINEAR : MQ_BLOCK_FULL}};
    int found = 0;
    for (size_t i = 0; i < 2 * MQ_COUNT(kinds); i++)
        found |= mq_condition_holds(family, &all[i % 2], &kinds[i / 2], condition);
    return found;
}

static int has_tensors(const mq_layer_module *row)
{
    return row->kind != MQ_MODULE_ATTENTION && row->kind != MQ_MODULE_EXPERTS;
}

/* suffix: "" for a tensor that is no module's. */
static int add_template(PyObject *list, const char *name, const char *suffix)
{
    const char *mark = strchr(name, '#');
    char expert[MQ_NAME_SIZE];
    if (mark != NULL)
        PyOS_snprintf(expert, sizeof expert, "%.*s{expert}%s", (int)(mark - name), name, mark + 1);
    return append(list, PyUnicode_FromFormat("model.layers.{layer}.%s%s", mark ? expert : name, suffix));
}

/* Every tensor that a model of the family may have. */
static PyObject *tensor_list(const mq_family *family)
{
    size_t count;
    const mq_layer_module *table = mq_layer_modules(&count);
    PyObject *list = Py_BuildValue("[sss]", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight");
    for (size_t i = 0; list != NULL && i < count; i++) {
        if (!has_tensors(&table[i]) || !may_hold(family, table[i].present)) continue;
        const char *suffix = table[i].kind == MQ_MODULE_VECTOR ? "" : ".weight";
        if (add_template(list, table[i].name, suffix) < 0 ||
            (may_hold(family, table[i].bias) && add_template(list, table[i].name, ".bias") < 0))
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *default_of(const mq_config_key *key)
{
    if (key->type == MQ_CONFIG_IS_REAL) return PyFloat_FromDouble(key->real);
    if (key->type == MQ_CONFIG_IS_NAME) return PyUnicode_FromString(key->word);
    return key->integer == MQ_REQUIRED ? Py_NewRef(Py_None) : PyLong_FromLongLong(key->integer);
}

static PyObject *key_dict(void)
{
    size_t count;
    const mq_config_key *keys = mq_config_keys(&count);
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict != NULL && i < count; i++) {
        PyObject *value = default_of(&keys[i]);
        if (value == NULL || PyDict_SetItemString(dict, keys[i].name, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

static PyObject *family_dict(const mq_family *family)
{
    return Py_BuildValue("{s:s,s:s,s:s,s:N,s:N,s:N,s:N,s:N}", "family", family->name, "models", family->models,
                         "oracle", family->oracle, "model_types", split(family->model_types),
                         "architectures", split(family->architectures), "flags", flag_list(family->flags), "tensors",
                         tensor_list(family), "config_keys", key_dict());
}

PyDoc_STRVAR(archs_doc,
"archs()\n--\n\n"
"The model families: [{'family', 'models', 'oracle', 'model_types', 'architectures', 'flags', 'tensors',\n"
"'config_keys'}].\n\n"
"models: some of them by their common names; oracle: whose logits the tests compare with.\n\n"
"tensors: names of all tensors a model may have, {layer} and {expert} standing for numbers.\n"
"config_keys: {flat key of Runtime's config: its default, None where it must be given}.");

static PyObject *archs(PyObject *module, PyObject *unused)
{
    size_t count;
    const mq_family *families = mq_families(&count);
    PyObject *list = PyList_New(0);
    (void)module;
    (void)unused;
    for (size_t i = 0; list != NULL && i < count; i++)
        if (append(list, family_dict(&families[i])) < 0) Py_CLEAR(list);
    return list;
}

static PyMethodDef methods[] = {
    {"archs", archs, METH_NOARGS, archs_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_py_archs = {.methods = methods};
