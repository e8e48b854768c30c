/* The dictionary that a Runtime takes, as the core's numbers. */
#include <string.h>

#include "core/alloc.h"
#include "py/runtime.h"

/* dict[name] as a new reference; NULL if it is not there or None (or, with an exception set, on failure). */
static PyObject *lookup(PyObject *dict, const char *name)
{
    PyObject *value = PyMapping_HasKeyString(dict, name) ? PyMapping_GetItemString(dict, name) : NULL;
    if (value == Py_None) Py_CLEAR(value);
    return value;
}

static int read_key(mq_config *config, const mq_config_key *key, PyObject *value)
{
    mq_error err;
    if (key->type == MQ_CONFIG_IS_INT) {
        long long integer = PyLong_AsLongLong(value);
        if (integer == -1 && PyErr_Occurred()) return -1;
        mq_config_set_int(config, key, integer);
        return 0;
    }
    if (key->type == MQ_CONFIG_IS_REAL) {
        double real = PyFloat_AsDouble(value);
        if (real == -1.0 && PyErr_Occurred()) return -1;
        mq_config_set_real(config, key, real);
        return 0;
    }
    const char *word = PyUnicode_AsUTF8(value);
    if (word == NULL) return -1;
    if (mq_config_set_word(config, key, word, &err) == MQ_OK) return 0;
    mq_raise(&err);
    return -1;
}

static void set_default(mq_config *config, const mq_config_key *key)
{
    if (key->type == MQ_CONFIG_IS_INT) mq_config_set_int(config, key, key->integer);
    else if (key->type == MQ_CONFIG_IS_REAL) mq_config_set_real(config, key, key->real);
    else mq_config_set_word(config, key, key->word, NULL);
}

static int read_name(PyObject *dict, const char *name, char *out)
{
    PyObject *given = lookup(dict, name);
    if (given == NULL) return PyErr_Occurred() ? -1 : 0;
    Py_ssize_t length = 0;
    const char *text = PyUnicode_AsUTF8AndSize(given, &length);
    if (text != NULL && length < MQ_NAME_ROOT) memcpy(out, text, (size_t)length + 1);
    else if (text != NULL) PyErr_Format(PyExc_ValueError, "config: %s %R is too long", name, given);
    Py_DECREF(given);
    return PyErr_Occurred() ? -1 : 0;
}

/* dict[name], numbers > 0, as many as the others that came before. */
static int read_factors(PyObject *dict, const char *name, float *out, int64_t *count)
{
    PyObject *given = lookup(dict, name);
    if (given == NULL) return PyErr_Occurred() ? -1 : 0;
    PyObject *items = PySequence_Fast(given, "config: factors must be a sequence of numbers");
    Py_DECREF(given);
    if (items == NULL) return -1;
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(items);
    if (n == 0 || n > MQ_ROPE_FACTORS || (*count > 0 && n != *count))
        PyErr_Format(PyExc_ValueError, "config: %s has %zd numbers", name, n);
    for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); i++) {
        out[i] = (float)PyFloat_AsDouble(PySequence_Fast_GET_ITEM(items, i));
        if (!PyErr_Occurred() && !(out[i] > 0.0f))
            PyErr_Format(PyExc_ValueError, "config: %s[%zd] must be positive", name, i);
    }
    Py_DECREF(items);
    *count = n;
    return PyErr_Occurred() ? -1 : 0;
}

/* None counts as not given, as in config.json. */
static int read_config(PyObject *dict, mq_config *config)
{
    size_t count;
    const mq_config_key *keys = mq_config_keys(&count);
    mq_error err;
    memset(config, 0, sizeof *config);
    for (size_t i = 0; i < count; i++) {
        PyObject *value = lookup(dict, keys[i].name);
        set_default(config, &keys[i]);
        int rc = value ? read_key(config, &keys[i], value) : PyErr_Occurred() ? -1 : 0;
        if (rc < 0 && value != NULL && PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "config: %s cannot be %R", keys[i].name, value);
        Py_XDECREF(value);
        if (rc < 0) return -1;
    }
    if (read_name(dict, "name_root", config->name_root) < 0 || read_name(dict, "name_head", config->name_head) < 0)
        return -1;
    if (read_factors(dict, "rope_short_factor", config->rope_short_factor, &config->rope_factors) < 0 ||
        read_factors(dict, "rope_long_factor", config->rope_long_factor, &config->rope_factors) < 0)
        return -1;
    if (mq_config_finish(config, &err) == MQ_OK) return 0;
    mq_raise(&err);
    return -1;
}

/* *out: layers numbers to be freed with mq_free, or NULL if the config does not say. */
static int read_per_layer(PyObject *dict, const char *key, int64_t most, int64_t layers, int64_t **out)
{
    PyObject *given = lookup(dict, key);
    *out = NULL;
    if (given == NULL) return PyErr_Occurred() ? -1 : 0;
    PyObject *items = PySequence_Fast(given, "config: layer_windows and the like must be sequences");
    Py_DECREF(given);
    if (items == NULL) return -1;
    int64_t *values = mq_alloc_array((size_t)layers, sizeof *values);
    if (values == NULL) PyErr_NoMemory();
    else if (PySequence_Fast_GET_SIZE(items) != (Py_ssize_t)layers)
        PyErr_Format(PyExc_ValueError, "config: %s has %zd entries for %lld layers", key,
                     PySequence_Fast_GET_SIZE(items), (long long)layers);
    for (int64_t i = 0; i < layers && !PyErr_Occurred(); i++) {
        values[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items, i));
        if (!PyErr_Occurred() && (values[i] < 0 || values[i] > most))
            PyErr_Format(PyExc_ValueError, "config: %s[%lld] is out of range", key, (long long)i);
    }
    Py_DECREF(items);
    *out = values;
    return PyErr_Occurred() ? -1 : 0;
}

/* What differs from layer to layer, by key of the config. */
static const struct { const char *key; int64_t most; size_t offset; } per_layer_keys[] = {
    {"layer_windows", INT32_MAX, offsetof(mq_per_layer, windows)},
    {"layer_experts", INT32_MAX, offsetof(mq_per_layer, experts)},
    {"layer_ropes", MQ_LAYER_LOCAL_ROPE, offsetof(mq_per_layer, ropes)},
    {"layer_chunks", INT32_MAX, offsetof(mq_per_layer, chunks)},
    {"layer_attention", MQ_BLOCK_LINEAR, offsetof(mq_per_layer, attention)},
    {"layer_mlp", MQ_BLOCK_LINEAR, offsetof(mq_per_layer, mlp)},
    {"layer_kv_heads", 65536, offsetof(mq_per_layer, kv_heads)},
    {"layer_intermediate_size", 1 << 24, offsetof(mq_per_layer, inner)},
};

int mq_read_config(PyObject *dict, mq_config *config, mq_per_layer *layers)
{
    int rc = read_config(dict, config);
    *layers = (mq_per_layer){.windows = NULL};
    for (size_t i = 0; rc == 0 && i < MQ_COUNT(per_layer_keys); i++) {
        int64_t *found = NULL;
        rc = read_per_layer(dict, per_layer_keys[i].key, per_layer_keys[i].most, config->num_hidden_layers, &found);
        memcpy((char *)layers + per_layer_keys[i].offset, &found, sizeof found);
    }
    return rc;
}

void mq_per_layer_free(mq_per_layer *layers)
{
    for (size_t i = 0; i < MQ_COUNT(per_layer_keys); i++) {
        int64_t *found;
        memcpy(&found, (char *)layers + per_layer_keys[i].offset, sizeof found);
        mq_free(found);
    }
}
