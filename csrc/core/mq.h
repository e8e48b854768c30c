/* Base header of modelq: included by everything, includes only the C library.
 * Also read by C++17/CUDA sources, so it keeps to the common subset. */
#ifndef MQ_H
#define MQ_H

#include <stddef.h>
#include <stdint.h>

#define MQ_VERSION "0.1.0"

#if defined(__CUDACC__) || defined(MQ_CUDA_SHIM)
#define MQ_HD __host__ __device__
#else
#define MQ_HD
#endif

#if defined(__cplusplus)
#define MQ_RESTRICT __restrict__
#else
#define MQ_RESTRICT restrict
#endif

#if defined(__GNUC__)
#define MQ_INLINE static inline __attribute__((always_inline, unused))
#define MQ_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define MQ_INLINE static inline
#define MQ_PRINTF(fmt, args)
#endif

#define MQ_MIN(a, b) ((a) < (b) ? (a) : (b))
#define MQ_MAX(a, b) ((a) > (b) ? (a) : (b))
#define MQ_CEIL_DIV(a, b) (((a) + (b) - 1) / (b))
#define MQ_ROUND_UP(a, b) (MQ_CEIL_DIV(a, b) * (b))
#define MQ_COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Status codes: 0 or negative. The Python layer maps each to one exception type (py/convert.c). */
enum {
    MQ_OK = 0,
    MQ_ERR_VALUE = -1,       /* a wrong argument or wrong data: ValueError */
    MQ_ERR_TYPE = -2,        /* a wrong kind of object or dtype: TypeError */
    MQ_ERR_MEMORY = -3,      /* MemoryError */
    MQ_ERR_IO = -4,          /* OSError */
    MQ_ERR_STATE = -5,       /* called in the wrong order: RuntimeError */
    MQ_ERR_INTERRUPTED = -6  /* the caller's poll asked to stop: the pending Python exception */
};

#endif
