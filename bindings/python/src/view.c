/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fkv._view.View: a fkv_tensor over an array of Python's, without a copy.
 *
 * The array comes through the buffer protocol or through DLPack (versioned or not). Both are told of
 * when the view goes, so that the memory stays where it is for as long as the view lives. This is C
 * because a decoding step makes four of these for every layer.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fkv/fkv.h>
#include <stddef.h>
#include <string.h>
#include <structmember.h>

/* ---- DLPack's binary interface, as its specification 1.0 lays it out */

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };
enum { DL_FLOAT = 2, DL_BFLOAT = 4 };
#define DL_FLAG_READ_ONLY 1u
#define DL_MAJOR 1

struct dl_tensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides; /* in elements; strides may be NULL: row-major */
    uint64_t byte_offset;
};
struct dl_managed {
    struct dl_tensor tensor;
    void *manager;
    void (*deleter)(struct dl_managed *);
};
struct dl_managed_versioned {
    uint32_t major, minor;
    void *manager;
    void (*deleter)(struct dl_managed_versioned *);
    uint64_t flags;
    struct dl_tensor tensor;
};

/* The C interface that a type may offer beside __dlpack__ (DLPack 1.2); ours are its first fields. */
struct dl_exchange {
    uint32_t major, minor;
    struct dl_exchange *older;
    void *allocate;
    int (*export_no_sync)(void *object, struct dl_managed_versioned **out);
};

/* ---- the object */

typedef struct {
    PyObject_HEAD fkv_tensor tensor;
    Py_buffer buffer; /* buffer.obj is NULL without one */
    PyObject *capsule;
    struct dl_managed_versioned *managed;
    int writable;
} View;

static const char *dtype_name(fkv_dtype dtype) {
    static const char *const names[] = {"none", "f32", "f16", "bf16"};
    return dtype >= 0 && dtype <= FKV_DTYPE_BF16 ? names[dtype] : "unknown";
}

/* Bytes from the first element to the end of the last. */
static uint64_t extent(const fkv_tensor *t, int64_t item) {
    uint64_t bytes = (uint64_t)item;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0)
            return 0;
        if (t->strides[i] > 0)
            bytes += (uint64_t)(t->shape[i] - 1) * (uint64_t)t->strides[i];
    }
    return bytes;
}

static int set_ndim(fkv_tensor *t, int ndim) {
    if (ndim < 0 || ndim > FKV_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "the array has %d dimensions; at most %d can be described",
                     ndim, FKV_MAX_NDIM);
        return -1;
    }
    t->ndim = ndim;
    return 0;
}

/* The type of a buffer's elements from its struct format, or as the caller says. */
static int set_buffer_dtype(View *self, fkv_dtype wanted) {
    const char *format = self->buffer.format ? self->buffer.format : "B";
    char order = '=';
    if (strchr("@=<>!", format[0]))
        order = *format++;
    const char code = format[0] && !format[1] ? format[0] : '?';
    fkv_dtype found = FKV_DTYPE_NONE;
    if (order != '>' && order != '!')
        found = code == 'f' ? FKV_DTYPE_F32 : code == 'e' ? FKV_DTYPE_F16 : FKV_DTYPE_NONE;
    /* bfloat16 has no format; its bits come as 16-bit integers, and so may those of f16. */
    if ((wanted == FKV_DTYPE_BF16 || wanted == FKV_DTYPE_F16) && (code == 'H' || code == 'h') &&
        order != '>' && order != '!')
        found = wanted;
    if (found == FKV_DTYPE_NONE) {
        PyErr_Format(PyExc_TypeError,
                     "elements of format '%s' are not supported: float32, float16, or the bits of "
                     "bfloat16 (uint16, by fkv.tensor(array, dtype='bf16'))",
                     self->buffer.format ? self->buffer.format : "B");
        return -1;
    }
    if (wanted != FKV_DTYPE_NONE && wanted != found) {
        PyErr_Format(PyExc_TypeError, "the array holds %s, not %s", dtype_name(found),
                     dtype_name(wanted));
        return -1;
    }
    self->tensor.dtype = found;
    return 0;
}

static int fill_from_buffer(View *self, PyObject *object, fkv_dtype dtype) {
    if (PyObject_GetBuffer(object, &self->buffer, PyBUF_STRIDES | PyBUF_FORMAT) < 0)
        return -1;
    const Py_buffer *b = &self->buffer;
    fkv_tensor *t = &self->tensor;
    if (self->writable && b->readonly) {
        PyErr_SetString(PyExc_ValueError, "the array is read-only, and this call writes to it");
        return -1;
    }
    if (set_buffer_dtype(self, dtype) < 0 || set_ndim(t, b->ndim) < 0)
        return -1;
    t->data = b->buf;
    int64_t dense = b->itemsize;
    for (int i = b->ndim - 1; i >= 0; i--) {
        t->shape[i] = b->shape[i];
        /* ctypes leaves them out although they were asked for. */
        t->strides[i] = b->strides ? b->strides[i] : dense;
        dense *= b->shape[i];
    }
    t->byte_length = extent(t, b->itemsize);
    return 0;
}

static int set_dl_dtype(fkv_tensor *t, const struct dl_tensor *dl, fkv_dtype wanted) {
    fkv_dtype found = FKV_DTYPE_NONE;
    if (dl->lanes == 1 && dl->code == DL_FLOAT)
        found = dl->bits == 32 ? FKV_DTYPE_F32 : dl->bits == 16 ? FKV_DTYPE_F16 : FKV_DTYPE_NONE;
    else if (dl->lanes == 1 && dl->code == DL_BFLOAT && dl->bits == 16)
        found = FKV_DTYPE_BF16;
    if (found == FKV_DTYPE_NONE) {
        PyErr_Format(PyExc_TypeError,
                     "DLPack type (code %d, bits %d, lanes %d) is not supported: float32, float16 "
                     "or bfloat16",
                     dl->code, dl->bits, dl->lanes);
        return -1;
    }
    if (wanted != FKV_DTYPE_NONE && wanted != found) {
        PyErr_Format(PyExc_TypeError, "the array holds %s, not %s", dtype_name(found),
                     dtype_name(wanted));
        return -1;
    }
    t->dtype = found;
    return 0;
}

static int fill_from_dl(View *self, const struct dl_tensor *dl, fkv_dtype dtype) {
    fkv_tensor *t = &self->tensor;
    if (set_dl_dtype(t, dl, dtype) < 0 || set_ndim(t, dl->ndim) < 0)
        return -1;
    switch (dl->device_type) {
    case DL_CPU:
    case DL_CUDA_HOST: /* pinned, but the host's */
        t->device = FKV_DEVICE_CPU;
        break;
    case DL_CUDA:
    case DL_CUDA_MANAGED:
        t->device = FKV_DEVICE_CUDA;
        t->device_id = dl->device_id;
        break;
    default:
        PyErr_Format(PyExc_TypeError, "arrays on DLPack device type %d are not supported",
                     dl->device_type);
        return -1;
    }
    const int64_t item = dl->bits / 8;
    t->data = dl->data ? (char *)dl->data + dl->byte_offset : NULL;
    int64_t dense = item;
    for (int i = dl->ndim - 1; i >= 0; i--) {
        t->shape[i] = dl->shape[i];
        t->strides[i] = dl->strides ? dl->strides[i] * item : dense;
        dense *= dl->shape[i];
    }
    t->byte_length = extent(t, item);
    return 0;
}

/* Calls object.__dlpack__(stream=, max_version=); producers of before 1.0 do not know max_version. */
static PyObject *ask_for_capsule(PyObject *object, PyObject *stream) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (!method)
        return NULL;
    PyObject *none = PyTuple_New(0), *capsule = NULL;
    PyObject *words = Py_BuildValue("{s:O,s:(ii)}", "stream", stream, "max_version", DL_MAJOR, 1);
    if (none && words) {
        capsule = PyObject_Call(method, none, words);
        if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            if (PyDict_DelItemString(words, "max_version") == 0)
                capsule = PyObject_Call(method, none, words);
        }
    }
    Py_XDECREF(none);
    Py_XDECREF(words);
    Py_DECREF(method);
    return capsule;
}

/* The device that the array says it is on: a CUDA array must be told the stream, others must not. */
static int device_of(PyObject *object, int *device) {
    PyObject *pair = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (!pair)
        return -1;
    int id;
    const int good = PyTuple_Check(pair) && PyArg_ParseTuple(pair, "ii", device, &id);
    if (!good && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "__dlpack_device__() did not return (type, id)");
    Py_DECREF(pair);
    return good ? 0 : -1;
}

static int fill_from_versioned(View *self, const struct dl_managed_versioned *m, fkv_dtype dtype) {
    if (m->major != DL_MAJOR) {
        PyErr_Format(PyExc_BufferError, "DLPack version %u.%u is not supported", m->major,
                     m->minor);
        return -1;
    }
    if (self->writable && m->flags & DL_FLAG_READ_ONLY) {
        PyErr_SetString(PyExc_ValueError, "the array is read-only, and this call writes to it");
        return -1;
    }
    return fill_from_dl(self, &m->tensor, dtype);
}

static int fill_from_capsule(View *self, PyObject *capsule, fkv_dtype dtype) {
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        return fill_from_versioned(self, PyCapsule_GetPointer(capsule, "dltensor_versioned"),
                                   dtype);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        struct dl_managed *m = PyCapsule_GetPointer(capsule, "dltensor");
        return fill_from_dl(self, &m->tensor, dtype);
    }
    PyErr_SetString(PyExc_TypeError, "__dlpack__() did not return a fresh DLPack capsule");
    return -1;
}

static const struct dl_exchange *exchange_of(PyObject *object) {
    PyObject *capsule =
        PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__dlpack_c_exchange_api__");
    const struct dl_exchange *api = NULL;
    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    while (api && api->major != DL_MAJOR)
        api = api->older;
    Py_XDECREF(capsule); /* the type keeps it */
    PyErr_Clear();
    return api;
}

/* 1: done, 0: not to be had in this way, -1: error. It does not wait for a device's work, so that it
 * serves the host's arrays only; it is ten times faster there. */
static int fill_from_exchange(View *self, PyObject *object, fkv_dtype dtype) {
    const struct dl_exchange *api = exchange_of(object);
    if (!api)
        return 0;
    if (api->export_no_sync(object, &self->managed) != 0) {
        self->managed = NULL;
        return -1;
    }
    if (self->managed->major == DL_MAJOR && self->managed->tensor.device_type != DL_CPU) {
        self->managed->deleter(self->managed);
        self->managed = NULL;
        return 0;
    }
    return fill_from_versioned(self, self->managed, dtype) < 0 ? -1 : 1;
}

static int fill_from_dlpack(View *self, PyObject *object, fkv_dtype dtype, PyObject *stream) {
    int device;
    const int done = fill_from_exchange(self, object, dtype);
    if (done)
        return done;
    if (device_of(object, &device) < 0)
        return -1;
    const int on_cuda = device == DL_CUDA || device == DL_CUDA_MANAGED;
    /* 1 is the legacy default stream in DLPack's numbering. */
    PyObject *default_stream = PyLong_FromLong(1);
    if (!default_stream)
        return -1;
    PyObject *tell = !on_cuda ? Py_None : stream == Py_None ? default_stream : stream;
    self->capsule = ask_for_capsule(object, tell);
    Py_DECREF(default_stream);
    if (!self->capsule)
        return -1;
    /* The capsule is not renamed to "used": it stays whole inside the view, and its own destructor
     * gives the memory back with it. */
    return fill_from_capsule(self, self->capsule, dtype);
}

static PyObject *view_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"object", "writable", "dtype", "stream", NULL};
    PyObject *object, *stream = Py_None;
    int writable = 0, dtype = FKV_DTYPE_NONE;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|piO", names, &object, &writable, &dtype,
                                     &stream))
        return NULL;
    if (Py_IS_TYPE(object, type)) {
        if (writable && !((View *)object)->writable) {
            PyErr_SetString(PyExc_ValueError,
                            "this call writes to the array, and its view was made "
                            "without writable=True");
            return NULL;
        }
        Py_INCREF(object);
        return object;
    }
    View *self = (View *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->writable = writable;
    self->tensor.struct_size = sizeof(self->tensor);
    int filled;
    if (PyObject_CheckBuffer(object)) {
        filled = fill_from_buffer(self, object, dtype);
    } else if (PyObject_HasAttrString(object, "__dlpack__")) {
        filled = fill_from_dlpack(self, object, dtype, stream);
    } else {
        PyErr_Format(PyExc_TypeError,
                     "%.200s is no array: it has neither the buffer protocol nor __dlpack__",
                     Py_TYPE(object)->tp_name);
        filled = -1;
    }
    if (filled < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void view_dealloc(View *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject *kind, *value, *trace;
    /* A view that could not be made goes with an exception set; owners may run code of Python. */
    PyErr_Fetch(&kind, &value, &trace);
    if (self->buffer.obj)
        PyBuffer_Release(&self->buffer);
    Py_XDECREF(self->capsule);
    if (self->managed && self->managed->deleter)
        self->managed->deleter(self->managed);
    PyErr_Restore(kind, value, trace);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *extents(const int64_t *values, int count) {
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple && i < count; i++) {
        PyObject *value = PyLong_FromLongLong(values[i]);
        if (!value) {
            Py_CLEAR(tuple);
            break;
        }
        PyTuple_SET_ITEM(tuple, i, value);
    }
    return tuple;
}

static PyObject *view_shape(View *self, void *closure) {
    (void)closure;
    return extents(self->tensor.shape, self->tensor.ndim);
}

static PyObject *view_strides(View *self, void *closure) {
    (void)closure;
    return extents(self->tensor.strides, self->tensor.ndim);
}

static PyObject *view_address(View *self, void *closure) {
    (void)closure;
    return PyLong_FromVoidPtr(&self->tensor);
}

static PyGetSetDef view_getset[] = {
    {"address", (getter)view_address, NULL, "Address of the fkv_tensor.", NULL},
    {"shape", (getter)view_shape, NULL, "Extents.", NULL},
    {"strides", (getter)view_strides, NULL, "Distances between neighbours, in bytes.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define TENSOR(field) (offsetof(View, tensor) + offsetof(fkv_tensor, field))
static PyMemberDef view_members[] = {
    {"dtype", T_INT, TENSOR(dtype), READONLY, "fkv_dtype_code."},
    {"device", T_INT, TENSOR(device), READONLY, "fkv_device_code."},
    {"device_id", T_INT, TENSOR(device_id), READONLY, "Number of the device."},
    {"nbytes", T_ULONGLONG, TENSOR(byte_length), READONLY, "Bytes from first to last."},
    {"data", T_ULONGLONG, TENSOR(data), READONLY, "Address of the first element."},
    {"writable", T_INT, offsetof(View, writable), READONLY, "1 if calls may write to it."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_doc, "View(object, writable=False, dtype=0, stream=None)\n--\n\n"
                "A fkv_tensor over an array, without a copy."},
    {Py_tp_new, view_new},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_getset, view_getset},
    {Py_tp_members, view_members},
    {0, NULL},
};
static PyType_Spec view_spec = {
    .name = "fkv._view.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = view_slots,
};

static int view_exec(PyObject *module) {
    PyObject *type = PyType_FromSpec(&view_spec);
    if (!type)
        return -1;
    const int added = PyModule_AddObject(module, "View", type);
    if (added < 0)
        Py_DECREF(type);
    return added;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, view_exec}, {0, NULL}};
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fkv._view",
    .m_size = 0,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__view(void) {
    return PyModuleDef_Init(&module);
}
