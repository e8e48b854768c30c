/* Opens cuBLASLt. No kernels. */
#include "cublaslt.cuh"

#include <dlfcn.h>

static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

enum { MQ_LT_OLDEST = 120000 };     /* the first with all that cublaslt.def has, or refuses it in good order */

static void *open_any(const char *name, char *reason, size_t size)
{
    snprintf(reason, size, "nothing was tried");
    for (size_t i = 0; i < (name != NULL ? 1 : MQ_COUNT(names)); i++) {
        void *opened = dlopen(name != NULL ? name : names[i], RTLD_NOW | RTLD_LOCAL);
        if (opened != NULL) return opened;
        const char *said = dlerror();
        if (i == 0) snprintf(reason, size, "%.300s", said != NULL ? said : "?");
    }
    return NULL;
}

/* The first call of cublaslt.def that the library lacks, or NULL. */
static const char *find_calls(lt::library *lib)
{
#define MQ_LT_CALL(result, name, parameters) \
    lib->name = (decltype(lib->name))dlsym(lib->opened, #name); \
    if (lib->name == NULL) return #name;
#include "cublaslt.def"
    return NULL;
}

int lt::open(library *lib, const char *name, mq_error *err)
{
    char reason[320];
    memset(lib, 0, sizeof *lib);
    lib->opened = open_any(name, reason, sizeof reason);
    if (lib->opened == NULL)
        return mq_fail(err, MQ_ERR_STATE, "cuBLASLt, which multiplies matrices on a GPU, was not found: %s. "
                       "`pip install 'modelq[cuda]'` installs it (package nvidia-cublas)", reason);
    const char *missing = find_calls(lib);
    if (missing == NULL) lib->version = (int64_t)lib->cublasLtGetVersion();
    if (missing == NULL && lib->version >= MQ_LT_OLDEST) return MQ_OK;
    close(lib);
    if (missing != NULL)
        return mq_fail(err, MQ_ERR_STATE, "%s is not cuBLASLt: it has no %s", name != NULL ? name : names[0], missing);
    return mq_fail(err, MQ_ERR_STATE, "cuBLASLt is too old: version %lld, at least %d is needed",
                   (long long)lib->version, (int)MQ_LT_OLDEST);
}

void lt::close(library *lib)
{
    if (lib->opened != NULL) dlclose(lib->opened);
    lib->opened = NULL;
}
