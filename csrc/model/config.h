/* The sizes and switches of one model: config.def as a struct. */
#ifndef MQ_CONFIG_H
#define MQ_CONFIG_H

#include "core/error.h"

typedef enum mq_rope_type {
    MQ_ROPE_DEFAULT, MQ_ROPE_LINEAR, MQ_ROPE_LLAMA3, MQ_ROPE_YARN, MQ_ROPE_LONGROPE, MQ_ROPE_DYNAMIC
} mq_rope_type;
typedef enum mq_activation { MQ_ACT_SILU, MQ_ACT_GELU_TANH, MQ_ACT_SWIGLU_CLAMPED } mq_activation;
typedef enum mq_routing { MQ_ROUTING_SOFTMAX, MQ_ROUTING_SIGMOID } mq_routing;

enum { MQ_ROPE_FACTORS = 512 };     /* frequencies of a head, at most */
enum { MQ_NAME_ROOT = 32 };

typedef struct mq_config {
#define MQ_CONFIG_INT(name, fallback) int64_t name;
#define MQ_CONFIG_REAL(name, fallback) double name;
#define MQ_CONFIG_NAME(name, fallback) int name;
#include "model/config.def"
#undef MQ_CONFIG_INT
#undef MQ_CONFIG_REAL
#undef MQ_CONFIG_NAME
    float rope_short_factor[MQ_ROPE_FACTORS], rope_long_factor[MQ_ROPE_FACTORS];    /* longrope: of wavelengths */
    int64_t rope_factors;           /* how many there are */
    char name_root[MQ_NAME_ROOT], name_head[MQ_NAME_ROOT];  /* what names of tensors begin with; "" = as usual */
} mq_config;

#define MQ_REQUIRED INT64_MIN
enum { MQ_MAX_EXPERTS = 4096 };

typedef enum mq_config_type { MQ_CONFIG_IS_INT, MQ_CONFIG_IS_REAL, MQ_CONFIG_IS_NAME } mq_config_type;

/* One key: where it is in the struct, and what it is when not given (word for MQ_CONFIG_IS_NAME). */
typedef struct mq_config_key {
    const char *name;
    mq_config_type type;
    size_t offset;
    int64_t integer;
    double real;
    const char *word;
} mq_config_key;

const mq_config_key *mq_config_keys(size_t *count);

void mq_config_set_int(mq_config *config, const mq_config_key *key, int64_t value);
void mq_config_set_real(mq_config *config, const mq_config_key *key, double value);
int mq_config_set_word(mq_config *config, const mq_config_key *key, const char *word, mq_error *err);

/* Fills in what is derived (head_dim, num_key_value_heads) and refuses what cannot be computed. */
int mq_config_finish(mq_config *config, mq_error *err);

/* How many numbers of a head rope turns. */
int64_t mq_config_rotary(const mq_config *config);

#endif
