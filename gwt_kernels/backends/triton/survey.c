/* Survey many tensors without a Python call for each; the contract is that of core/survey.py. */
#include <Python.h>
#include <structmember.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* PyTorch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h); 0 is success. */
typedef const void *Handle; /* address of a pointer to a tensor */
extern int32_t aoti_torch_get_data_ptr(Handle, void **);
extern int32_t aoti_torch_get_dtype(Handle, int32_t *);
extern int32_t aoti_torch_get_layout(Handle, int32_t *);
extern int32_t aoti_torch_get_device_type(Handle, int32_t *);
extern int32_t aoti_torch_get_device_index(Handle, int32_t *);
extern int32_t aoti_torch_get_dim(Handle, int64_t *);
extern int32_t aoti_torch_get_sizes(Handle, int64_t **);
extern int32_t aoti_torch_is_contiguous(Handle, bool *);
extern int32_t aoti_torch_layout_strided(void);
/* bool at::native::is_neg(const at::Tensor &), missing in that interface. */
extern bool _ZN2at6native6is_negERKNS_6TensorE(Handle);

enum { MOST_DIMENSIONS = 8, ABSENT = -1 };

typedef struct { /* without gaps: kinds are compared as bytes */
    int64_t dimensions; /* ABSENT for None, with all other fields 0 */
    int32_t dtype, layout, device_type, device_index;
    int64_t plain; /* contiguous, without negative bit */
    int64_t sizes[MOST_DIMENSIONS];
} Kind;

static PyObject *tensor_type, *parameter_type, *data_ptr, *grad_name, *local_name;
static PyGetSetDef *grad; /* getter of these types */
static Py_ssize_t offset; /* of the handle in objects of these types */

/* Return the handle of a Tensor or Parameter; NULL for subclasses, which may override attributes, and others. */
static Handle handle_of(PyObject *x)
{
    PyObject *type = (PyObject *)Py_TYPE(x);
    return type == tensor_type || type == parameter_type ? (const char *)x + offset : NULL;
}

static PyObject *open_(PyObject *module, PyObject *arguments)
{
    PyTypeObject *tensor, *parameter;
    PyObject *method, *attribute;
    Py_ssize_t place;
    if (!PyArg_ParseTuple(arguments, "O!O!OO!n:open", &PyType_Type, &tensor, &PyType_Type, &parameter, &method,
                          &PyGetSetDescr_Type, &attribute, &place))
        return NULL;
    if (!PyType_IsSubtype(tensor, PyDescr_TYPE(attribute)))
        return PyErr_Format(PyExc_ValueError, "%R is no attribute of tensors", attribute);
    const Py_ssize_t last = tensor->tp_basicsize - (Py_ssize_t)sizeof(Handle);
    if (place < (Py_ssize_t)sizeof(PyObject) || place > last || !PyType_IsSubtype(parameter, tensor))
        return PyErr_Format(PyExc_ValueError, "no handle lies %zd bytes into a tensor", place);
    tensor_type = (PyObject *)Py_NewRef(tensor); /* never released, like the module */
    parameter_type = (PyObject *)Py_NewRef(parameter);
    data_ptr = Py_NewRef(method);
    grad = ((PyGetSetDescrObject *)Py_NewRef(attribute))->d_getset;
    grad_name = PyUnicode_InternFromString("grad");
    local_name = PyUnicode_InternFromString("_local_tensor");
    offset = place;
    Py_RETURN_NONE;
}

static int address_of(PyObject *x, uint64_t *address)
{
    Handle handle = handle_of(x);
    void *found;
    if (handle && aoti_torch_get_data_ptr(handle, &found) == 0) {
        *address = (uint64_t)(uintptr_t)found;
        return 0;
    }
    if (!data_ptr) {
        PyErr_SetString(PyExc_RuntimeError, "call open() first");
        return -1;
    }
    PyObject *number = PyObject_CallOneArg(data_ptr, x);
    if (!number)
        return -1;
    *address = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *addresses(PyObject *module, PyObject *tensors)
{
    PyObject *held = PySequence_Tuple(tensors); /* a Python method called here may change a list */
    if (!held)
        return NULL;
    const Py_ssize_t n = PyTuple_GET_SIZE(held);
    PyObject *words = PyBytes_FromStringAndSize(NULL, n * (Py_ssize_t)sizeof(uint64_t));
    for (Py_ssize_t i = 0; words && i < n; ++i)
        if (address_of(PyTuple_GET_ITEM(held, i), (uint64_t *)PyBytes_AS_STRING(words) + i) < 0)
            Py_CLEAR(words);
    Py_DECREF(held);
    return words;
}

static PyObject *grads(PyObject *module, PyObject *tensors)
{
    if (!grad_name)
        return PyErr_Format(PyExc_RuntimeError, "call open() first");
    PyObject *held = PySequence_Tuple(tensors); /* a user's attribute may change a list */
    if (!held)
        return NULL;
    const Py_ssize_t n = PyTuple_GET_SIZE(held);
    PyObject *found = PyList_New(n);
    for (Py_ssize_t i = 0; found && i < n; ++i) {
        PyObject *x = PyTuple_GET_ITEM(held, i);
        PyObject *own = handle_of(x) ? grad->get(x, grad->closure) : PyObject_GetAttr(x, grad_name);
        if (own)
            PyList_SET_ITEM(found, i, own);
        else
            Py_CLEAR(found);
    }
    Py_DECREF(held);
    return found;
}

/* Write a tensor's kind and return whether it was possible. Does not call Python. */
static bool read_kind(PyObject *x, Kind *kind)
{
    memset(kind, 0, sizeof *kind);
    if (x == Py_None) {
        kind->dimensions = ABSENT;
        return true;
    }
    Handle handle = handle_of(x);
    int64_t *sizes;
    if (!handle || aoti_torch_get_dim(handle, &kind->dimensions) || kind->dimensions > MOST_DIMENSIONS ||
        aoti_torch_get_sizes(handle, &sizes) || aoti_torch_get_dtype(handle, &kind->dtype) ||
        aoti_torch_get_layout(handle, &kind->layout) || aoti_torch_get_device_type(handle, &kind->device_type) ||
        aoti_torch_get_device_index(handle, &kind->device_index))
        return false;
    memcpy(kind->sizes, sizes, (size_t)kind->dimensions * sizeof *sizes);
    if (kind->layout == aoti_torch_layout_strided()) {
        bool contiguous;
        if (aoti_torch_is_contiguous(handle, &contiguous))
            return false;
        kind->plain = contiguous && !_ZN2at6native6is_negERKNS_6TensorE(handle);
    }
    return true;
}

static PyObject *kinds(PyObject *module, PyObject *tensors)
{
    if (!PyList_Check(tensors))
        return PyErr_Format(PyExc_TypeError, "kinds() takes a list, got %R", Py_TYPE(tensors));
    const Py_ssize_t n = PyList_GET_SIZE(tensors);
    PyObject *known = PyBytes_FromStringAndSize(NULL, n * (Py_ssize_t)sizeof(Kind));
    for (Py_ssize_t i = 0; known && i < n; ++i)
        if (!read_kind(PyList_GET_ITEM(tensors, i), (Kind *)PyBytes_AS_STRING(known) + i)) {
            Py_DECREF(known);
            Py_RETURN_NONE;
        }
    return known;
}

static PyObject *alike(PyObject *module, PyObject *arguments)
{
    PyObject *tensors, *known;
    if (!PyArg_ParseTuple(arguments, "O!S:alike", &PyList_Type, &tensors, &known))
        return NULL;
    const Py_ssize_t n = PyList_GET_SIZE(tensors);
    const Kind *expected = (const Kind *)PyBytes_AS_STRING(known);
    bool all = PyBytes_GET_SIZE(known) == n * (Py_ssize_t)sizeof(Kind);
    for (Py_ssize_t i = 0; all && i < n; ++i) {
        Kind kind;
        all = read_kind(PyList_GET_ITEM(tensors, i), &kind) && memcmp(&kind, expected + i, sizeof kind) == 0;
    }
    return PyBool_FromLong(all);
}

/* Call `take` on every object of a state in order while it returns 1; return its last result. */
static int each(PyObject *state, int (*take)(void *, PyObject *, bool is_value), void *taker)
{
    PyObject *owner, *own, *key, *value;
    int taken = 1;
    if (!PyDict_Check(state))
        return PyErr_Format(PyExc_TypeError, "a state is a dict, got %R", Py_TYPE(state)), -1;
    for (Py_ssize_t at = 0; taken > 0 && PyDict_Next(state, &at, &owner, &own);) {
        if ((taken = take(taker, owner, false)) > 0)
            taken = take(taker, own, false);
        const bool is_state = PyDict_Check(own); /* anything else is the user's own */
        for (Py_ssize_t place = 0; is_state && taken > 0 && PyDict_Next(own, &place, &key, &value);)
            if ((taken = take(taker, key, false)) > 0)
                taken = take(taker, value, true);
    }
    return taken;
}

static int append(void *list, PyObject *object, bool is_value)
{
    return PyList_Append(list, object) < 0 ? -1 : 1;
}

static PyObject *entries(PyObject *module, PyObject *state)
{
    PyObject *found = PyList_New(0);
    if (found && each(state, append, found) < 0)
        Py_CLEAR(found);
    return found;
}

enum { NO_MEMORY, A_TENSOR, A_SHARD }; /* kind of an address: none, a tensor's, or a shard's */

typedef struct {
    uint64_t kind, address;
} Memory;

typedef struct {
    PyObject *list;
    Py_ssize_t next;
    const Memory *memory; /* of the values still to come */
    const Memory *end;
} Known;

/* Return a new reference to a DTensor's shard; reading its slot is faster than getting the attribute. */
static PyObject *local_of(PyObject *shard)
{
    static PyTypeObject *known;
    static Py_ssize_t place; /* offset of the slot in the known type; 0 if it has none */
    if (Py_TYPE(shard) != known) {
        PyObject *member = PyObject_GetAttr((PyObject *)Py_TYPE(shard), local_name);
        place = member && Py_IS_TYPE(member, &PyMemberDescr_Type) ? ((PyMemberDescrObject *)member)->d_member->offset
                                                                  : 0;
        Py_XDECREF(member);
        PyErr_Clear();
        known = (PyTypeObject *)Py_NewRef(Py_TYPE(shard)); /* DTensor types are few, and never released */
    }
    PyObject *local = place ? *(PyObject **)((char *)shard + place) : NULL;
    return local ? Py_NewRef(local) : PyObject_GetAttr(shard, local_name);
}

static int is_next(void *taker, PyObject *object, bool is_value)
{
    Known *known = taker;
    if (known->next >= PyList_GET_SIZE(known->list) || PyList_GET_ITEM(known->list, known->next++) != object)
        return 0;
    if (!is_value)
        return 1;
    if (known->memory == known->end)
        return 0;
    const Memory memory = *known->memory++;
    if (memory.kind == NO_MEMORY)
        return 1;
    uint64_t address;
    PyObject *local = memory.kind == A_SHARD ? local_of(object) : Py_NewRef(object);
    const int failed = local ? address_of(local, &address) : -1;
    Py_XDECREF(local);
    return failed < 0 ? -1 : address == memory.address;
}

static PyObject *still(PyObject *module, PyObject *arguments)
{
    PyObject *state, *memory;
    Known known = {0};
    if (!PyArg_ParseTuple(arguments, "OO!S:still", &state, &PyList_Type, &known.list, &memory))
        return NULL;
    known.memory = (const Memory *)PyBytes_AS_STRING(memory);
    known.end = known.memory + PyBytes_GET_SIZE(memory) / (Py_ssize_t)sizeof(Memory);
    const int taken = each(state, is_next, &known);
    return taken < 0 ? NULL : PyBool_FromLong(taken && known.next == PyList_GET_SIZE(known.list));
}

static PyObject *same(PyObject *module, PyObject *arguments)
{
    PyObject *these, *those;
    if (!PyArg_ParseTuple(arguments, "O!O!:same", &PyList_Type, &these, &PyList_Type, &those))
        return NULL;
    const Py_ssize_t n = PyList_GET_SIZE(these);
    if (PyList_GET_SIZE(those) != n)
        Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < n; ++i)
        if (PyList_GET_ITEM(these, i) != PyList_GET_ITEM(those, i))
            Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

static PyMethodDef functions[] = {
    {"open", open_, METH_VARARGS, NULL},
    {"addresses", addresses, METH_O, NULL},
    {"grads", grads, METH_O, NULL},
    {"kinds", kinds, METH_O, NULL},
    {"alike", alike, METH_VARARGS, NULL},
    {"entries", entries, METH_O, NULL},
    {"still", still, METH_VARARGS, NULL},
    {"same", same, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gwt_survey",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit_gwt_survey(void)
{
    return PyModule_Create(&definition);
}
