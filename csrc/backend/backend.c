#include "backend/backend.h"

#include <dlfcn.h>
#include <string.h>

/* The table and the header say the same. */
#define MQ_CUDA_CALL(returned, name, parameters) \
    _Static_assert(_Generic(&mq_cuda_##name, returned(*) parameters: 1, default: 0), "mq_cuda_" #name " in cuda.def");
#include "backend/cuda.def"

static const char rebuild[] = "build it from modelq's sources of this version: MODELQ_CUDA=1 pip install .";

static int find(void *library, const char *path, const char *name, void *out, mq_error *err)
{
    void *symbol = dlsym(library, name);
    if (symbol == NULL)
        return mq_fail(err, MQ_ERR_STATE, "the CUDA library %s lacks %s: %s", path, name, rebuild);
    memcpy(out, &symbol, sizeof symbol);    /* ISO C has no cast from an object's address to a function's */
    return MQ_OK;
}

static int check_interface(void *library, const char *path, mq_error *err)
{
    int (*number)(void) = NULL;
    const int rc = find(library, path, "mq_cuda_interface", &number, err);
    if (rc != MQ_OK) return rc;
    const int have = number();
    if (have == MQ_CUDA_INTERFACE) return MQ_OK;
    return mq_fail(err, MQ_ERR_STATE, "the CUDA library %s has version %d of the interface, this modelq needs %d: %s",
                   path, have, (int)MQ_CUDA_INTERFACE, rebuild);
}

int mq_backend_open(mq_backend *backend, const char *path, mq_error *err)
{
    memset(backend, 0, sizeof *backend);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);   /* a device may be at work to the end */
    if (library == NULL) {
        const char *why = dlerror();
        return mq_fail(err, MQ_ERR_STATE, "the CUDA library does not open: %s", why != NULL ? why : path);
    }
    int rc = check_interface(library, path, err);
#define MQ_CUDA_CALL(returned, name, parameters) \
    if (rc == MQ_OK) rc = find(library, path, "mq_cuda_" #name, &backend->name, err);
#include "backend/cuda.def"
    backend->library = library;
    if (rc != MQ_OK) mq_backend_close(backend);
    return rc;
}

void mq_backend_close(mq_backend *backend)
{
    if (backend->library != NULL) dlclose(backend->library);
    memset(backend, 0, sizeof *backend);
}
