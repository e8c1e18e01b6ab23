/* tiers.c - codes of fixed width for bytes that are mostly few values.
 *
 * The one idea: the bytes whose first code is the escape form a stream of their own, coded again
 * with one bit more, so each pass is the same for every byte: look the code up, and put the next
 * bytes of the stream behind it where the escapes are. Byte i of a group's sixteen holds the codes
 * of the group's bytes i, i + 16, i + 32 and i + 48, so that one shift and one mask unpack a whole
 * vector. */
#include "tiers.h"

#include <stdbool.h>
#include <string.h>

#include "bytes.h"
#include "fast.h"

#define ESCAPE_1 TIERS_FIRST
#define ESCAPE_2 TIERS_SECOND
#define BYTES_1 16u /* of a group of first codes */
#define BYTES_2 24u /* of second codes: two bits as in the first, then the third bits as a u64 */
#define SAMPLE 8u   /* every so many groups are counted to choose the frequent values */

static uint32_t groups_of(uint32_t n)
{
    return (n + TIERS_GROUP - 1) / TIERS_GROUP;
}

/* ---- encoding */

/* Which values are frequent: `first` and `second` in descending order, ties to the lower. */
static void choose_values(const uint8_t *src, uint32_t n, uint8_t *frequent)
{
    uint32_t count[4][256] = {{0}};

    for (uint32_t at = 0; at < n; at += SAMPLE * TIERS_GROUP) {
        uint32_t m = n - at < TIERS_GROUP ? n - at : TIERS_GROUP;

        for (uint32_t i = 0; i < m; i++)
            count[i % 4][src[at + i]]++;
    }
    for (unsigned v = 0; v < 256; v++)
        count[0][v] += count[1][v] + count[2][v] + count[3][v] + 1;
    for (unsigned k = 0; k < TIERS_FIRST + TIERS_SECOND; k++) {
        unsigned best = 0;

        for (unsigned v = 1; v < 256; v++)
            if (count[0][v] > count[0][best])
                best = v;
        frequent[k] = (uint8_t)best;
        count[0][best] = 0;
    }
}

FAST static void pack_codes(const uint8_t *restrict code, uint8_t *restrict out)
{
    for (unsigned i = 0; i < 16; i++)
        out[i] = (uint8_t)((code[i] & 3) | (code[i + 16] & 3) << 2 | (code[i + 32] & 3) << 4 |
                           (code[i + 48] & 3) << 6);
}

/* Bit 2 of each code: eight of them at a time are multiplied into the top byte. */
static void pack_third_bits(const uint8_t *code, uint8_t *out)
{
    for (unsigned i = 0; i < TIERS_GROUP / 8; i++) {
        struct rd r = rd_init(code + 8 * i, 8);
        uint64_t bits = rd_u64(&r) >> 2 & 0x0101010101010101ull;

        out[i] = (uint8_t)(bits * 0x0102040810204080ull >> 56);
    }
}

/* Codes of src to *out by `escape`; returns how many bytes escape, which go to `escaped`. The last
 * group is padded with what does not escape. */
static uint32_t encode(tiers_escape *escape, const uint8_t *src, uint32_t n, const uint8_t *value,
                       uint32_t group_bytes, uint8_t *escaped, uint8_t *out)
{
    uint32_t whole = n / TIERS_GROUP, n_escaped;
    uint8_t last[TIERS_GROUP];

    n_escaped = escape(src, whole, value, out, escaped);
    if (n % TIERS_GROUP) {
        memset(last, value[0], sizeof last);
        memcpy(last, src + (size_t)whole * TIERS_GROUP, n % TIERS_GROUP);
        n_escaped += escape(last, 1, value, out + (size_t)whole * group_bytes, escaped + n_escaped);
    }
    return n_escaped;
}

size_t tiers_encode(const struct tiers_kernel *k, const uint8_t *src, uint32_t n, uint8_t *scratch,
                    uint8_t *out, size_t cap)
{
    uint8_t frequent[TIERS_FIRST + TIERS_SECOND];
    size_t n_first = TIERS_HEADER + (size_t)groups_of(n) * BYTES_1, n_codes;
    struct wr w = wr_init(out, TIERS_HEADER);
    uint32_t n_escaped;

    if (cap < n_first)
        return 0;
    choose_values(src, n, frequent);
    n_escaped = encode(k->escape, src, n, frequent, BYTES_1, scratch, out + TIERS_HEADER);
    n_codes = n_first + (size_t)groups_of(n_escaped) * BYTES_2;
    if (cap < n_codes + n_escaped)
        return 0; /* hardly so: that all of them escape again */
    wr_u32(&w, n_escaped);
    wr_bytes(&w, frequent, sizeof frequent);
    wr_u16(&w, 0);
    return n_codes + encode(k->escape_again, scratch, n_escaped, frequent + TIERS_FIRST, BYTES_2,
                            out + n_codes, out + n_first);
}

/* ---- inner loops, plain */

static uint32_t escape_plain(const uint8_t *src, uint32_t groups, const uint8_t *values,
                             uint8_t *codes, uint8_t *escaped)
{
    uint32_t n = 0;

    for (; groups; groups--, src += TIERS_GROUP, codes += BYTES_1) {
        uint8_t code[TIERS_GROUP];

        for (unsigned i = 0; i < TIERS_GROUP; i++) {
            uint8_t v = src[i];

            code[i] = v == values[0] ? 0 : v == values[1] ? 1 : v == values[2] ? 2 : ESCAPE_1;
            escaped[n] = v;
            n += code[i] == ESCAPE_1;
        }
        pack_codes(code, codes);
    }
    return n;
}

static uint32_t escape_again_plain(const uint8_t *src, uint32_t groups, const uint8_t *values,
                                   uint8_t *codes, uint8_t *escaped)
{
    uint8_t code_of[256];
    uint32_t n = 0;

    memset(code_of, ESCAPE_2, sizeof code_of);
    for (unsigned i = 0; i < TIERS_SECOND; i++)
        code_of[values[i]] = (uint8_t)i;
    for (; groups; groups--, src += TIERS_GROUP, codes += BYTES_2) {
        uint8_t code[TIERS_GROUP];

        for (unsigned i = 0; i < TIERS_GROUP; i++) {
            code[i] = code_of[src[i]];
            if (code[i] == ESCAPE_2)
                escaped[n++] = src[i];
        }
        pack_codes(code, codes);
        pack_third_bits(code, codes + BYTES_1);
    }
    return n;
}

static unsigned code_at(const uint8_t *codes, unsigned i)
{
    return codes[i % 16] >> (i / 16 * 2) & 3;
}

static int second_plain(const uint8_t *codes, uint32_t groups, const uint8_t table[16],
                        const uint8_t **raw, const uint8_t *end, uint8_t *out)
{
    for (; groups; groups--, codes += BYTES_2, out += TIERS_GROUP)
        for (unsigned i = 0; i < TIERS_GROUP; i++) {
            unsigned code = code_at(codes, i) | (unsigned)(codes[BYTES_1 + i / 8] >> i % 8 & 1)
                                                    << 2;

            if (code == ESCAPE_2 && *raw == end)
                return -1;
            out[i] = code == ESCAPE_2 ? *(*raw)++ : table[code];
        }
    return 0;
}

static void first_plain(const uint8_t *codes, uint32_t groups, const uint8_t table[16],
                        const uint8_t **escaped, uint8_t *out)
{
    for (; groups; groups--, codes += BYTES_1, out += TIERS_GROUP)
        for (unsigned i = 0; i < TIERS_GROUP; i++) {
            unsigned code = code_at(codes, i);

            out[i] = code == ESCAPE_1 ? *(*escaped)++ : table[code];
        }
}

static const struct tiers_kernel plain = {"generic", escape_plain, escape_again_plain, second_plain,
                                          first_plain};

/* ---- inner loops with vectors */

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,popcnt,bmi")))
#define VBMI2 __attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt,bmi")))

/* Eight bytes shuffled by a mask. expand[m]: the lanes of m take the next bytes in turn, others
 * none (0x80). compact[m]: the bytes of m move together. */
static uint8_t expand[256][8], compact[256][8];

__attribute__((constructor)) static void fill_shuffles(void)
{
    for (unsigned m = 0; m < 256; m++)
        for (unsigned i = 0, n = 0; i < 8; i++) {
            expand[m][i] = m >> i & 1 ? (uint8_t)n : 0x80;
            if (m >> i & 1)
                compact[m][n++] = (uint8_t)i;
        }
}

/* Bytes of `raw` for the lanes in mask, which are few. */
static inline int put_raw(uint64_t mask, const uint8_t **raw, const uint8_t *end, uint8_t *out)
{
    for (; mask; mask &= mask - 1) {
        if (*raw == end)
            return -1;
        out[__builtin_ctzll(mask)] = *(*raw)++;
    }
    return 0;
}

/* Codes of bytes 0..31 (half 0) or 32..63 of a group, two bits each. */
AVX2 static inline __m256i half_codes(const uint8_t *codes, int half)
{
    __m128i c = _mm_loadu_si128((const __m128i *)(const void *)codes);
    __m128i lo = half ? _mm_srli_epi16(c, 4) : c;

    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(lo, 2), lo), _mm256_set1_epi8(3));
}

AVX2 static inline __m256i table_of(const uint8_t table[16])
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)table));
}

/* Codes of 32 bytes; *ret_mask: those that escape. */
AVX2 static inline __m256i codes_of(const uint8_t *src, const uint8_t *values, uint32_t *ret_mask)
{
    __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)src);
    __m256i a = _mm256_cmpeq_epi8(v, _mm256_set1_epi8((char)values[0]));
    __m256i b = _mm256_cmpeq_epi8(v, _mm256_set1_epi8((char)values[1]));
    __m256i c = _mm256_cmpeq_epi8(v, _mm256_set1_epi8((char)values[2]));
    __m256i known = _mm256_or_si256(_mm256_or_si256(a, b), c);
    __m256i code = _mm256_or_si256(_mm256_and_si256(b, _mm256_set1_epi8(1)),
                                   _mm256_and_si256(c, _mm256_set1_epi8(2)));

    *ret_mask = ~(uint32_t)_mm256_movemask_epi8(known);
    return _mm256_or_si256(code, _mm256_andnot_si256(known, _mm256_set1_epi8(ESCAPE_1)));
}

/* The low two bits of a group's codes, bytes 0..31 and 32..63, as sixteen bytes. */
AVX2 static inline void put_codes(__m256i lo, __m256i hi, uint8_t *codes)
{
    const __m256i two_bits = _mm256_set1_epi8(3);
    __m256i both = _mm256_or_si256(_mm256_and_si256(lo, two_bits),
                                   _mm256_slli_epi16(_mm256_and_si256(hi, two_bits), 4));

    _mm_storeu_si128((__m128i *)(void *)codes,
                     _mm_or_si128(_mm256_castsi256_si128(both),
                                  _mm_slli_epi16(_mm256_extracti128_si256(both, 1), 2)));
}

/* The bytes of the mask to `out`; returns its new end. Writes up to eight bytes beyond that. */
AVX2 static inline uint8_t *put_escaped(const uint8_t *src, uint32_t mask, uint8_t *out)
{
    for (int i = 0; i < 4; i++, src += 8, mask >>= 8) {
        __m128i v = _mm_loadl_epi64((const __m128i *)(const void *)src);
        __m128i s = _mm_loadl_epi64((const __m128i *)(const void *)compact[mask & 0xff]);

        _mm_storel_epi64((__m128i *)(void *)out, _mm_shuffle_epi8(v, s));
        out += __builtin_popcount(mask & 0xff);
    }
    return out;
}

AVX2 static uint32_t escape_avx2(const uint8_t *src, uint32_t groups, const uint8_t *values,
                                 uint8_t *codes, uint8_t *escaped)
{
    uint8_t *end = escaped;

    for (; groups; groups--, src += TIERS_GROUP, codes += BYTES_1) {
        uint32_t lo_mask, hi_mask;
        __m256i lo = codes_of(src, values, &lo_mask), hi = codes_of(src + 32, values, &hi_mask);

        put_codes(lo, hi, codes);
        end = put_escaped(src, lo_mask, end);
        end = put_escaped(src + 32, hi_mask, end);
    }
    return (uint32_t)(end - escaped);
}

/* Second codes of 32 bytes; *ret_mask: those that escape. */
AVX2 static inline __m256i second_codes_of(const uint8_t *src, const uint8_t *values,
                                           uint32_t *ret_mask)
{
    const __m256i escape = _mm256_set1_epi8(ESCAPE_2);
    __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)src), code = escape;

    for (unsigned i = 0; i < TIERS_SECOND; i++) {
        __m256i is = _mm256_cmpeq_epi8(v, _mm256_set1_epi8((char)values[i]));

        code = _mm256_xor_si256(code, _mm256_and_si256(is, _mm256_set1_epi8((char)(ESCAPE_2 ^ i))));
    }
    *ret_mask = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(code, escape));
    return code;
}

AVX2 static uint32_t escape_again_avx2(const uint8_t *src, uint32_t groups, const uint8_t *values,
                                       uint8_t *codes, uint8_t *escaped)
{
    uint32_t n = 0;

    for (; groups; groups--, src += TIERS_GROUP, codes += BYTES_2) {
        uint32_t mask[2], third[2];
        __m256i code[2];

        for (int half = 0; half < 2; half++) {
            code[half] = second_codes_of(src + 32 * half, values, &mask[half]);
            third[half] = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(code[half], 5));
        }
        put_codes(code[0], code[1], codes);
        memcpy(codes + BYTES_1, third, sizeof third);
        for (uint64_t m = (uint64_t)mask[1] << 32 | mask[0]; m; m &= m - 1)
            escaped[n++] = src[__builtin_ctzll(m)];
    }
    return n;
}

/* 0xff in the bytes whose bit is set. */
AVX2 static inline __m256i bits_to_bytes(uint32_t bits)
{
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                            2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    __m256i x = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), spread);

    return _mm256_cmpeq_epi8(_mm256_and_si256(x, bit), bit);
}

AVX2 static int second_avx2(const uint8_t *codes, uint32_t groups, const uint8_t table[16],
                            const uint8_t **raw, const uint8_t *end, uint8_t *out)
{
    const __m256i values = table_of(table), four = _mm256_set1_epi8(4);

    for (; groups; groups--, codes += BYTES_2, out += TIERS_GROUP) {
        uint64_t mask = 0;

        for (int half = 0; half < 2; half++) {
            uint32_t third;
            __m256i code = half_codes(codes, half);

            memcpy(&third, codes + BYTES_1 + 4 * half, 4);
            code = _mm256_or_si256(code, _mm256_and_si256(bits_to_bytes(third), four));
            _mm256_storeu_si256((__m256i *)(void *)(out + 32 * half),
                                _mm256_shuffle_epi8(values, code));
            mask |= (uint64_t)(uint32_t)_mm256_movemask_epi8(
                        _mm256_cmpeq_epi8(code, _mm256_set1_epi8(ESCAPE_2)))
                    << (32 * half);
        }
        if (put_raw(mask, raw, end, out))
            return -1;
    }
    return 0;
}

/* Eight bytes: those of the mask from the stream, zero elsewhere. */
AVX2 static inline __m128i take_8(const uint8_t *from, unsigned mask)
{
    return _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)(const void *)from),
                            _mm_loadl_epi64((const __m128i *)(const void *)expand[mask]));
}

AVX2 static inline __m128i take_16(const uint8_t *from, unsigned mask)
{
    unsigned lo = mask & 0xff;

    return _mm_unpacklo_epi64(take_8(from, lo),
                              take_8(from + __builtin_popcount(lo), mask >> 8 & 0xff));
}

AVX2 static void first_avx2(const uint8_t *codes, uint32_t groups, const uint8_t table[16],
                            const uint8_t **escaped, uint8_t *out)
{
    const __m256i values = table_of(table);
    const uint8_t *from = *escaped;

    for (; groups; groups--, codes += BYTES_1, out += TIERS_GROUP)
        for (int half = 0; half < 2; half++) {
            __m256i code = half_codes(codes, half);
            uint32_t mask =
                (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(code, _mm256_set1_epi8(ESCAPE_1)));
            const uint8_t *mid = from + __builtin_popcount(mask & 0xffff);
            __m256i fill = _mm256_set_m128i(take_16(mid, mask >> 16), take_16(from, mask & 0xffff));

            /* table[3] is 0, and `fill` is 0 where nothing escapes */
            _mm256_storeu_si256((__m256i *)(void *)(out + 32 * half),
                                _mm256_or_si256(_mm256_shuffle_epi8(values, code), fill));
            from += __builtin_popcount(mask);
        }
    *escaped = from;
}

/* The 64 two-bit codes of a group, a byte each. */
VBMI2 static inline __m512i group_codes(const uint8_t *codes)
{
    __m512i c = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)codes));

    return _mm512_and_si512(_mm512_srlv_epi64(c, _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0)),
                            _mm512_set1_epi8(3));
}

VBMI2 static int second_vbmi2(const uint8_t *codes, uint32_t groups, const uint8_t table[16],
                              const uint8_t **raw, const uint8_t *end, uint8_t *out)
{
    const __m512i values =
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)table));

    for (; groups; groups--, codes += BYTES_2, out += TIERS_GROUP) {
        __m512i code = group_codes(codes);
        uint64_t third;

        memcpy(&third, codes + BYTES_1, 8);
        code = _mm512_mask_add_epi8(code, third, code, _mm512_set1_epi8(4));
        _mm512_storeu_si512(out, _mm512_shuffle_epi8(values, code));
        if (put_raw(_mm512_cmpeq_epi8_mask(code, _mm512_set1_epi8(ESCAPE_2)), raw, end, out))
            return -1;
    }
    return 0;
}

VBMI2 static void first_vbmi2(const uint8_t *codes, uint32_t groups, const uint8_t table[16],
                              const uint8_t **escaped, uint8_t *out)
{
    const __m512i values =
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)table));
    const uint8_t *from = *escaped;

    for (; groups; groups--, codes += BYTES_1, out += TIERS_GROUP) {
        __m512i code = group_codes(codes);
        __mmask64 mask = _mm512_cmpeq_epi8_mask(code, _mm512_set1_epi8(ESCAPE_1));

        _mm512_storeu_si512(out, _mm512_mask_expand_epi8(_mm512_shuffle_epi8(values, code), mask,
                                                         _mm512_loadu_si512(from)));
        from += __builtin_popcountll(mask);
    }
    *escaped = from;
}

static const struct tiers_kernel avx2 = {"avx2", escape_avx2, escape_again_avx2, second_avx2,
                                         first_avx2};
static const struct tiers_kernel vbmi2 = {"avx512vbmi2", escape_avx2, escape_again_avx2,
                                          second_vbmi2, first_vbmi2};

const struct tiers_kernel *tiers_kernel(unsigned i)
{
    const struct tiers_kernel *have[3] = {NULL};
    unsigned n = 0;

    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw"))
        have[n++] = &vbmi2;
    if (__builtin_cpu_supports("avx2"))
        have[n++] = &avx2;
    have[n++] = &plain;
    return i < n ? have[i] : NULL;
}
#else
const struct tiers_kernel *tiers_kernel(unsigned i)
{
    return i ? NULL : &plain;
}
#endif

/* ---- decoding */

int tiers_open(struct tiers *t, const struct tiers_kernel *k, const uint8_t *coded, size_t len,
               uint32_t n, uint8_t *escaped)
{
    struct rd r = rd_init(coded, len);
    uint32_t n_escaped = rd_u32(&r);
    const uint8_t *value = rd_bytes(&r, TIERS_FIRST + TIERS_SECOND), *second;
    uint8_t table[16] = {0};
    uint16_t zero = rd_u16(&r);

    *t = (struct tiers){.kernel = k, .n_groups = groups_of(n), .escaped = escaped};
    t->codes = rd_bytes(&r, (uint64_t)t->n_groups * BYTES_1);
    if (!rd_ok(&r) || zero || n_escaped > n)
        return -1;
    t->escaped_end = escaped + n_escaped;
    memcpy(t->table, value, TIERS_FIRST);
    memcpy(table, value + TIERS_FIRST, TIERS_SECOND);
    second = rd_bytes(&r, (uint64_t)groups_of(n_escaped) * BYTES_2);
    if (!rd_ok(&r) || k->second(second, groups_of(n_escaped), table, &r.p, r.end, escaped))
        return -1;
    return rd_left(&r) ? -1 : 0;
}

uint32_t tiers_read(struct tiers *t, uint32_t upto, uint8_t *dst)
{
    uint32_t want = groups_of(upto), n = want > t->group ? want - t->group : 0;

    if (n > t->n_groups - t->group)
        n = t->n_groups - t->group;
    t->kernel->first(t->codes, n, t->table, &t->escaped, dst + (size_t)t->group * TIERS_GROUP);
    t->codes += (size_t)n * BYTES_1;
    t->group += n;
    return t->group * TIERS_GROUP;
}

int tiers_close(const struct tiers *t)
{
    return t->group == t->n_groups && t->escaped == t->escaped_end ? 0 : -1;
}
