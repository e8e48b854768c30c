#include "py/runtime.h"

#include "core/alloc.h"
#include "py/parts.h"

/* (parts, scheme, dtype, block_size), or (numbers, scheme, dtype, block_size, (amax, block_amax, second_divisor)). */
static int view_stored(mq_state *state, PyObject *value, mq_stored_weight *stored, mq_named_tensor *entry,
                       PyObject **keep)
{
    PyObject *parts, *block_size, *scaling = NULL;
    const char *scheme, *dtype;
    *stored = (mq_stored_weight){.job.name = entry->name};
    if (!PyArg_ParseTuple(value, "OssO|O!", &parts, &scheme, &dtype, &block_size, &PyTuple_Type, &scaling) ||
        mq_parse_scheme(scheme, block_size, &stored->job) < 0 || mq_parse_float_dtype(dtype, &stored->dtype) < 0)
        return -1;
    if (scaling == NULL ? mq_view_parts(state, parts, stored, keep) < 0
                        : mq_view_numbers(state, parts, scaling, stored, keep) < 0)
        return -1;
    entry->tensor = mq_tensor_make(NULL, stored->dtype, 2, stored->shape);
    entry->stored = stored;
    return 0;
}

static void add(mq_tensor_map *map, mq_state *state, PyObject *key, PyObject *value)
{
    mq_named_tensor *entry = &map->tensors[map->count];
    PyObject *name = PyUnicode_Check(key) ? Py_NewRef(key) : PyObject_Str(key);
    PyObject *array = NULL;
    if (name == NULL || (entry->name = PyUnicode_AsUTF8(name)) == NULL) goto fail;
    entry->stored = NULL;
    if (PyTuple_Check(value) ? view_stored(state, value, &map->stored[map->count], entry, &array) < 0
                             : mq_view_object(state, value, entry->name, &entry->tensor, &array) < 0)
        goto fail;
    /* The name's text lives as long as the string: kept with the array. */
    map->keeps[2 * map->count] = name;
    map->keeps[2 * map->count + 1] = array;
    map->count++;
    return;
fail:
    Py_XDECREF(name);
}

int mq_tensor_map_init(mq_tensor_map *map, mq_state *state, PyObject *dict)
{
    *map = (mq_tensor_map){0};
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "tensors: expected a dict {name: array}, got %.100s", Py_TYPE(dict)->tp_name);
        return -1;
    }
    PyObject *items = PyDict_Items(dict);  /* a copy: making an array of a value may run any Python code */
    if (items == NULL) return -1;
    size_t count = (size_t)PyList_GET_SIZE(items);
    map->tensors = mq_alloc_array(count, sizeof *map->tensors);
    map->keeps = mq_alloc_array(count, 2 * sizeof *map->keeps);
    map->stored = mq_alloc_array(count, sizeof *map->stored);
    if (map->tensors == NULL || map->keeps == NULL || map->stored == NULL) PyErr_NoMemory();
    for (size_t i = 0; i < count && !PyErr_Occurred(); i++) {
        PyObject *item = PyList_GET_ITEM(items, (Py_ssize_t)i);
        add(map, state, PyTuple_GET_ITEM(item, 0), PyTuple_GET_ITEM(item, 1));
    }
    Py_DECREF(items);
    if (!PyErr_Occurred()) return 0;
    mq_tensor_map_free(map);
    return -1;
}

void mq_tensor_map_free(mq_tensor_map *map)
{
    for (size_t i = 0; i < 2 * map->count; i++) Py_DECREF(map->keeps[i]);
    mq_free(map->tensors);
    mq_free(map->keeps);
    mq_free(map->stored);
    *map = (mq_tensor_map){0};
}

PyObject *mq_as_booleans(PyObject *object)
{
    PyObject *numpy = PyImport_ImportModule("numpy");
    PyObject *array = numpy ? PyObject_CallMethod(numpy, "not_equal", "Oi", object, 0) : NULL;
    Py_XDECREF(numpy);
    return array;
}

int mq_enter(_Atomic int *busy, const char *what)
{
    int expected = 0;
    if (atomic_compare_exchange_strong(busy, &expected, 1)) return 0;
    PyErr_Format(PyExc_RuntimeError, "%s is in use by another thread", what);
    return -1;
}

void mq_leave(_Atomic int *busy)
{
    atomic_store(busy, 0);
}
