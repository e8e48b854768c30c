/* One code per element, of every row of formats.def. */
#include "convert.cuh"

/* ---- kernels ---- */

typedef struct codes_args {
    float *values;
    void *codes;
    int64_t count;
    const char *format;      /* for errors: host memory */
} codes_args;

static void describe(const codes_args &a, char *out, size_t size)
{
    snprintf(out, size, "format %s, %lld values at %p, codes at %p", a.format, (long long)a.count,
             (const void *)a.values, a.codes);
}

/* The type that holds a code. */
template <int Bytes> struct code_word { typedef uint32_t type; };
template <> struct code_word<1> { typedef uint8_t type; };
template <> struct code_word<2> { typedef uint16_t type; };

template <mq_format F>
static __global__ void encode(codes_args a)
{
    typedef typename code_word<(mq_codec_of<F>().bits + 7) / 8>::type word;
    const int64_t i = mq_thread_index();
    if (i < a.count) ((word *)a.codes)[i] = (word)mq_encode_as<F>(a.values[i]);
}

template <mq_format F>
static __global__ void decode(codes_args a)
{
    typedef typename code_word<(mq_codec_of<F>().bits + 7) / 8>::type word;
    const int64_t i = mq_thread_index();
    if (i < a.count) a.values[i] = mq_decode(((const word *)a.codes)[i], mq_codec_of<F>());
}

/* ---- launchers ---- */

typedef void (*codes_kernel)(codes_args);

#define MQ_FORMAT(id, ...) encode<MQ_FMT_##id>,
static const codes_kernel encoders[MQ_FMT_COUNT] = {
#include "format/formats.def"
};
#undef MQ_FORMAT

#define MQ_FORMAT(id, ...) decode<MQ_FMT_##id>,
static const codes_kernel decoders[MQ_FMT_COUNT] = {
#include "format/formats.def"
};
#undef MQ_FORMAT

static int run(const mq_cuda_codes_job *job, bool encodes, void *stream, mq_error *err)
{
    if ((unsigned)job->format >= (unsigned)MQ_FMT_COUNT || job->count < 0)
        return mq_fail(err, MQ_ERR_VALUE, "format %d, %lld elements", (int)job->format, (long long)job->count);
    if (job->count == 0) return MQ_OK;
    const codes_args a = {job->values, job->codes, job->count, mq_format_get(job->format)->name};
    const mq_launch launch = {encodes ? "encode" : "decode", mq_grid_for(a.count), stream, err};
    return mq_launch_kernel(&launch, (encodes ? encoders : decoders)[job->format], a);
}

int mq_cuda_encode(const mq_cuda_codes_job *job, void *stream, mq_error *err)
{
    return run(job, true, stream, err);
}

int mq_cuda_decode(const mq_cuda_codes_job *job, void *stream, mq_error *err)
{
    return run(job, false, stream, err);
}
