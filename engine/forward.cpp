// The forward pass of the engine on a CPU: every token of a step, of however many sequences, goes
// through the whole Transformer in one call, over the paged cache. native.py compiles this file on
// first use and packs a model for it. forward.py is the same pass in torch; tests/engine/
// test_native.py holds both equal to model.py.
//
// When few texts are written, a step takes the time that the weights need on their way from memory;
// when prompts are read, the time that the multiplications need. So weights lie exactly in the
// order in which they are used: W output rows (the lanes of a vector) side by side, all inputs of
// these rows one after the other. That is a panel. A panel is multiplied with up to 8 tokens at
// once, and its bytes are read once for all of them.
//
// No result depends on what else is in the batch: the sums of a token are taken in the same order
// whatever its neighbours are (test_no_logit_depends_on_the_rest_of_the_batch).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// ----------------------------------------------------------------------------------------- vectors
#if defined(__AVX512VNNI__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));  // W lanes, one output row each
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint8_t Codes __attribute__((vector_size(4 * W)));  // 4 unsigned codes a lane
typedef uint16_t Shifts __attribute__((vector_size(4 * W)));
constexpr int PAGE = 16;  // tokens of a block of the cache
constexpr int CHUNK = 8;  // blocks that attention reads before it corrects its sums

template <class V>
static inline V load(const void *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
static inline void store(void *p, V v) {
    memcpy(p, &v, sizeof v);
}
static inline Floats all(float x) { return x - Floats{}; }

static inline Floats load_half(const uint16_t *p) {  // W float16 -> float32
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    Floats y;
    for (int i = 0; i < W; i++) {
        _Float16 h;
        memcpy(&h, p + i, 2);
        y[i] = h;
    }
    return y;
#endif
}

// In every lane: sum += the dot product of its 4 unsigned codes, of which BITS bits are used, with
// the 4 signed bytes at q.
template <int BITS>
static inline Ints dot4(Ints sum, Codes codes, const int8_t *q) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes,
                                     _mm512_set1_epi32(load<int32_t>(q)));
#elif defined(__AVX2__)
    // maddubs adds pairs in 16 bits. 15 * 127 * 2 fits there and 255 * 127 * 2 does not, so codes
    // are multiplied half a byte at a time.
    __m256i four = _mm256_set1_epi32(load<int32_t>(q));
    __m256i c = (__m256i)codes;
    __m256i low = _mm256_set1_epi8(15);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(c, low), four);
    sum += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    if (BITS == 4)
        return sum;
    pairs = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c, 4), low), four);
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(16));
#else
    for (int i = 0; i < W; i++)
        for (int j = 0; j < 4; j++)
            sum[i] += int(codes[4 * i + j]) * q[j];
    return sum;
#endif
}

static inline float add(Floats v) {
    float s = 0;
    for (int i = 0; i < W; i++)
        s += v[i];
    return s;
}
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline float largest(Floats v) {
    float s = v[0];
    for (int i = 1; i < W; i++)
        s = std::max(s, v[i]);
    return s;
}

// e^x = 2^n e^r with |r| <= ln(2) / 2, and Cephes' polynomial for e^r: within 2e-7.
static inline Floats exp(Floats x) {
    const Floats given = x;
    x = larger(x, all(-87.0f));
    x = x < 88.0f ? x : all(88.0f);
    const Floats magic = all(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
    const Floats n = x * 1.44269504f + magic - magic;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return given < -87.0f ? Floats{} : (Floats)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}

// ----------------------------------------------------------------------------------------- threads
// The threads of a step stay alive between steps. A step has hundreds of phases, and between two
// of them all threads should meet in less than a microsecond. OpenMP's threads do that only for the
// main thread: called from another one, as in a server, its pools count as more threads than there
// are cores and go to sleep at every barrier, which is 5 times slower.
//
// Each thread has its own share of a phase's items, so that what it reads stays in its own cache; a
// thread that has finished takes items from the others. A thread whose core was busy when the step
// began finds the first phases done; nobody waits for it. While the engine steps, torch has one
// thread (native.quiet_torch): two sets of spinning threads would fight for the cores.
struct Team {
    std::mutex turn, sleep;
    std::condition_variable wake;
    // The round's number and, in the low 16 bits, how many threads may take part; those bits are 0
    // once it is over.
    std::atomic<uint64_t> round{0};
    std::atomic<int> inside{0};  // helpers that are in the round
    int size = 1;                // threads of the round
    const std::function<void(int)> *job = nullptr;
    std::vector<std::atomic<int>> taken;  // of each share of each phase: items that were begun
    std::vector<std::atomic<int>> done;   // of each phase: items that are done
    std::vector<std::thread::native_handle_type> helpers;
    std::vector<int> cores;  // the caller's, then the helpers'; too few of them: no thread is bound

    // The team is never destroyed, since its threads never end.
    static Team &only() {
        static Team *team = new Team;
        return *team;
    }

    // The i-th short wait in a row. Within a step no thread yields that has a core of its own:
    // where something else wants it, a thread that yields may be gone for a time slice.
    void pause(int i, bool within) {
#if defined(__x86_64__)
        const bool bound = cores.size() > helpers.size();
        if (i < 400 || (within && bound)) {
            _mm_pause();
            return;
        }
#endif
        std::this_thread::yield();
    }

    // Calls f(first, last) for all of 0..count-1, up to `grain` of them at a time, and returns when
    // all are done.
    template <class F>
    void share(int phase, int me, int count, int grain, F f) {
        int made = 0;
        for (int k = 0; k < size; k++) {
            const int whose = (me + k) % size;
            const int begin = int64_t(count) * whose / size;
            const int end = int64_t(count) * (whose + 1) / size;
            std::atomic<int> &next = taken[phase * size + whose];
            while (begin + next < end) {
                const int first = begin + next.fetch_add(grain);
                const int last = std::min(first + grain, end);
                if (first < last) {
                    f(first, last);
                    made += last - first;
                }
            }
        }
        if (made)
            done[phase] += made;
        for (int i = 0; done[phase] < count; i++)
            pause(i, true);
    }

    void work(int me, uint64_t seen) {
        for (;;) {
            // Spin for some microseconds, then let others run, and at last go to sleep.
            for (int i = 0; round == seen; i++) {
                if (i < 10000) {
                    pause(i, false);
                    continue;
                }
                std::unique_lock<std::mutex> lock(sleep);
                wake.wait(lock, [&] { return round != seen; });
            }
            seen = round;
            if (me >= int(seen & 0xffff))
                continue;
            inside++;
            if (round == seen)  // else it is over, and what the job refers to is gone
                (*job)(me);
            inside--;
        }
    }

    // Bind each helper to a core of its own. A thread that wakes while something else is on its
    // core would be put onto the caller's, and the two would take turns. The caller runs where the
    // system likes; the helper whose core that is changes places with it.
    void spread() {
#if defined(__linux__)
        const int here = sched_getcpu();
        if (!cores.empty() && here == cores[0])
            return;
        cpu_set_t set;
        if (cores.empty() && !sched_getaffinity(0, sizeof set, &set))
            for (int c = 0; c < CPU_SETSIZE; c++)
                if (CPU_ISSET(c, &set))
                    cores.push_back(c);
        if (cores.size() <= helpers.size())
            return;
        std::swap(cores[0], *std::find(cores.begin(), cores.end() - 1, here));
        for (size_t i = 0; i < helpers.size(); i++) {
            CPU_ZERO(&set);
            CPU_SET(cores[i + 1], &set);
            pthread_setaffinity_np(helpers[i], sizeof set, &set);
        }
#endif
    }

    // Calls f(0), ..., f(threads - 1) at once. A helper that wakes late takes no part.
    void run(int threads, size_t phases, const std::function<void(int)> &f) {
        std::lock_guard<std::mutex> mine(turn);
        while (int(helpers.size()) < threads - 1) {
            std::thread helper(&Team::work, this, int(helpers.size()) + 1, uint64_t(round));
            helpers.push_back(helper.native_handle());
            helper.detach();
            cores.clear();
        }
        spread();
        if (taken.size() < phases * threads)
            taken = std::vector<std::atomic<int>>(phases * threads);
        if (done.size() < phases)
            done = std::vector<std::atomic<int>>(phases);
        for (auto &n : taken)
            n.store(0, std::memory_order_relaxed);
        for (auto &n : done)
            n.store(0, std::memory_order_relaxed);
        const uint64_t number = ((round >> 16) + 1) << 16;
        {
            std::lock_guard<std::mutex> lock(sleep);
            job = &f;
            size = threads;
            round = number | threads;
        }
        wake.notify_all();
        f(0);
        round = number;
        for (int i = 0; inside; i++)
            pause(i, true);
    }
};

// ------------------------------------------------------------------------------------------- nouns
enum Kind { FLOAT32 = 0, FLOAT16 = 1, INT8 = 2, INT4 = 3 };

// A layer (T, K) -> (T, N); the classes of the same names in native.py lie the same in memory.
struct Linear {
    int32_t kind, N;
    int32_t K;      // padded to a multiple of `group`
    int32_t group;  // inputs that share a scale and a zero point, a multiple of 8
    // Panels (N/W, K, W); INT8: (N/W, K/4, W, 4); INT4: (N/W, K/8, W, 4), inputs 4 to 7 in the high
    // halves of the bytes.
    const uint8_t *weight;
    const uint16_t *scale;  // (N/W, K/group, W) float16: w = scale * (code - zero)
    const uint16_t *zero;   // (N/W, K/group, W) float16
    const int32_t *order;   // (inputs,) packed column j is input order[j]; null: as they come
    const float *bias;      // (N,) or null
    int32_t inputs;         // K before padding
    int32_t rank;           // of all LoRA adapters together, 0: there are none
    const float *a;         // (rank, inputs)
    const float *b;         // panels (N/W, rank, W)
    // (adapters + 1, rank): an adapter's scale at its own ranks, else 0; no adapter's row is last
    const float *rank_scale;
};

// LayerNorm with a bias, RMSNorm without.
struct Norm {
    const float *gain;
    const float *bias;
};

struct Layer {
    Norm norm1, norm2, q_norm, k_norm;  // of C, C, D, D; without a gain there is no norm
    Linear qkv[3], out, up[2], down;    // up: gate and value, or without a gate (GPT-2) one alone
    void *keys, *values;                // of the cache, where the pass has put them
    int64_t window;                     // keys a query sees, itself included; 0: all
};

struct Model {
    int32_t L, C, H, KV, D, M;  // layers, width, query heads, key heads, head's width, MLP's width
    float eps;
    int32_t cached;       // FLOAT32 or FLOAT16: the type of keys and values
    int64_t layer_bytes;  // of a layer's keys, and of its values
    char *cache;          // keys (L, blocks, KV, D, PAGE), then values (L, blocks, KV, PAGE, D)
    const float *embed;   // (V, C)
    const float *places;  // embeddings of positions (P, C), or null
    const float *cos;     // (P, D), or null
    const float *sin;     // (P, D), negative in its first half
    Norm norm;
    Layer *layers;
    Linear head;
};

// The tokens of one sequence in this step.
struct Span {
    int32_t start;   // the first of them
    int32_t n;       // how many
    int32_t past;    // tokens in the cache before them
    int32_t blocks;  // where the sequence's list of blocks begins
};

// Tokens (T, K) as a layer reads them: rounded, x = scale * q, where its weights are integers, and
// multiplied by LoRA's first matrix.
struct Prepared {
    std::vector<int8_t> q;
    std::vector<float> scale;  // (T, K/group)
    std::vector<float> sum;    // (T, K/group): the sum of the group's q
    std::vector<float> low;    // (T, rank): A x for the ranks of the token's own adapter, else 0
    const int32_t *adapters;   // (T,) row of `rank_scale`
};

// ---------------------------------------------------------------------------------------- products
// Rounds each group of a token's inputs to 8 bits, by its largest magnitude.
static void round_row(const Linear &w, const float *x, int t, Prepared &to) {
    const int groups = w.K / w.group;
    int8_t *q = &to.q[size_t(t) * w.K];
    for (int g = 0; g < groups; g++, q += w.group) {
        float top = 1e-30f;
        alignas(64) float h[8];
        const int from = g * w.group;
        const int n = std::min(w.group, w.inputs - from);
        if (!w.order && n % W == 0) {
            Floats most = {};
            for (int i = 0; i < n; i += W) {
                Floats v = load<Floats>(x + from + i);
                most = larger(most, larger(v, -v));
            }
            top = std::max(top, largest(most));
        } else {
            for (int i = 0; i < n; i++) {
                const int at = w.order ? w.order[from + i] : from + i;
                top = std::max(top, std::fabs(x[at]));
            }
        }
        const float inverse = 127 / top;
        int sum = 0;
        for (int i = 0; i < w.group; i += 8) {
            // The low bits of 1.5 * 2^23 + x are x, rounded.
            for (int j = 0; j < 8; j++) {
                const int k = from + i + j;
                const bool inside = i + j < n;
                h[j] = inside ? x[w.order ? w.order[k] : k] * inverse + 12582912.0f : 12582912.0f;
            }
            for (int j = 0; j < 8; j++) {
                int32_t v;
                memcpy(&v, h + j, 4);
                v -= 0x4B400000;
                q[i + j] = v;
                sum += v;
            }
        }
        to.scale[t * groups + g] = top / 127;
        to.sum[t * groups + g] = sum;
    }
}

// What LoRA's first matrix makes of a token, times the adapter's scale.
static void adapt_row(const Linear &w, const float *x, int t, Prepared &to) {
    const float *rank_scale = w.rank_scale + size_t(to.adapters[t]) * w.rank;
    for (int r = 0; r < w.rank; r++) {
        Floats sum = {};
        if (rank_scale[r] != 0)
            for (int k = 0; k < w.inputs; k += W)
                sum += load<Floats>(x + k) * load<Floats>(w.a + size_t(r) * w.inputs + k);
        to.low[size_t(t) * w.rank + r] = add(sum) * rank_scale[r];
    }
}

// W outputs of a token with what LoRA adds to them: y + B (scale A x).
static inline Floats adapted(const Linear &w, int panel, int t, const Prepared &x, Floats y) {
    const float *rank_scale = w.rank_scale + size_t(x.adapters[t]) * w.rank;
    for (int r = 0; r < w.rank; r++)
        if (rank_scale[r] != 0)
            y += x.low[size_t(t) * w.rank + r] *
                 load<Floats>(w.b + (size_t(panel) * w.rank + r) * W);
    return y;
}

// R tokens times P panels of floats, into y[r][p].
template <int R, int P>
static inline void multiply_float(const Linear &w, int panel, const float *x, Floats y[R][P]) {
    const int K = w.K;
    const size_t size = size_t(K) * W;
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            y[r][p] = Floats{};
    for (int k = 0; k < K; k++)
        for (int p = 0; p < P; p++) {
            const size_t at = (panel + p) * size + size_t(k) * W;
            const Floats v = w.kind == FLOAT32 ? load<Floats>((const float *)w.weight + at)
                                               : load_half((const uint16_t *)w.weight + at);
            for (int r = 0; r < R; r++)
                y[r][p] += x[size_t(r) * w.inputs + k] * v;
        }
}

// R tokens times P panels of codes. Of each group
//     sum of scale * (code - zero) * step * q = scale * step * (sum of code * q - zero * sum of q).
template <int BITS, int R, int P>
static inline void multiply_codes(const Linear &w, int panel, const Prepared &x, int t,
                                  Floats y[R][P]) {
    const int K = w.K, groups = K / w.group;
    const size_t size = size_t(K) * W * BITS / 8;
    const uint8_t *codes = w.weight + panel * size;
    const int8_t *q = &x.q[size_t(t) * K];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            y[r][p] = Floats{};
    for (int g = 0; g < groups; g++) {
        Ints sum[R][P] = {};
        for (int end = (g + 1) * w.group, k = g * w.group; k < end; k += 32 / BITS, codes += 4 * W)
            for (int p = 0; p < P; p++) {
                const Codes c = load<Codes>(codes + p * size);
                if (BITS == 8) {
                    for (int r = 0; r < R; r++)
                        sum[r][p] = dot4<8>(sum[r][p], c, q + size_t(r) * K + k);
                } else {
                    const Codes low = c & 15;
                    const Codes high = (Codes)((Shifts)c >> 4) & 15;
                    for (int r = 0; r < R; r++) {
                        sum[r][p] = dot4<4>(sum[r][p], low, q + size_t(r) * K + k);
                        sum[r][p] = dot4<4>(sum[r][p], high, q + size_t(r) * K + k + 4);
                    }
                }
            }
        for (int p = 0; p < P; p++) {
            const size_t at = (size_t(panel + p) * groups + g) * W;
            const Floats scale = load_half(w.scale + at);
            const Floats zero = load_half(w.zero + at);
            for (int r = 0; r < R; r++) {
                const size_t row = size_t(t + r) * groups + g;
                y[r][p] += (__builtin_convertvector(sum[r][p], Floats) - zero * x.sum[row]) *
                           (scale * x.scale[row]);
            }
        }
    }
}

// R tokens times P panels of any kind, with adapters and bias, into y; with `onto` added to it.
template <int R, int P>
static inline void multiply_block(const Linear &w, int panel, const float *x,
                                  const Prepared &prepared, int t, float *y, size_t stride,
                                  bool onto) {
    Floats sums[R][P];
    if (w.kind == INT8)
        multiply_codes<8, R, P>(w, panel, prepared, t, sums);
    else if (w.kind == INT4)
        multiply_codes<4, R, P>(w, panel, prepared, t, sums);
    else
        multiply_float<R, P>(w, panel, x + size_t(t) * w.inputs, sums);
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
            const int n = (panel + p) * W;
            const int lanes = std::min(W, w.N - n);
            float *to = y + (t + r) * stride + n;
            if (w.rank)
                sums[r][p] = adapted(w, panel + p, t + r, prepared, sums[r][p]);
            if (lanes == W) {
                if (w.bias)
                    sums[r][p] += load<Floats>(w.bias + n);
                store(to, onto ? load<Floats>(to) + sums[r][p] : sums[r][p]);
            } else {
                for (int i = 0; i < lanes; i++) {
                    const float bias = w.bias ? w.bias[n + i] : 0;
                    to[i] = sums[r][p][i] + bias + (onto ? to[i] : 0);
                }
            }
        }
}

// R tokens times as many of the panels from `panel` to `end` as fit the registers -> how many.
template <int R>
static inline int multiply_panels(const Linear &w, int panel, int end, const float *x,
                                  const Prepared &prepared, int t, float *y, size_t stride,
                                  bool onto) {
    // Enough sums at once to hide the latency of an addition, few enough for the registers.
    constexpr int P = R == 1 ? 4 : 2;
    if (panel + P > end) {
        multiply_block<R, 1>(w, panel, x, prepared, t, y, stride, onto);
        return 1;
    }
    multiply_block<R, P>(w, panel, x, prepared, t, y, stride, onto);
    return P;
}

static inline int panels_of(const Linear &w) { return (w.N + W - 1) / W; }

// Panels first..last-1 of y (T, N) = x (T, K) times the weights; with `onto` they are added to y.
// Several layers with the same inputs, whose outputs lie one after the other in y, are counted
// through. All tokens go through a few panels, which stay in the cache, before the next few.
static void products(const Linear *layers, int count, const float *x, const Prepared *prepared,
                     int T, float *y, size_t stride, bool onto, int first, int last) {
    for (int j = 0; j < count && first < last; j++) {
        const Linear &w = layers[j];
        const int end = std::min(last, panels_of(w));
        const int most = T == 1 ? 4 : 2;
        int panel = std::max(first, 0);
        while (panel < end) {
            const int step = end - panel >= most ? most : 1;
            const int stop = panel + step;
            int t = 0;
            while (t < T) {
                if (T - t >= 8) {
                    multiply_panels<8>(w, panel, stop, x, prepared[j], t, y, stride, onto);
                    t += 8;
                } else if (T - t >= 4) {
                    multiply_panels<4>(w, panel, stop, x, prepared[j], t, y, stride, onto);
                    t += 4;
                } else if (T - t >= 2) {
                    multiply_panels<2>(w, panel, stop, x, prepared[j], t, y, stride, onto);
                    t += 2;
                } else {
                    int p = panel;
                    while (p < stop)
                        p += multiply_panels<1>(w, p, stop, x, prepared[j], t, y, stride, onto);
                    t += 1;
                }
            }
            panel = stop;
        }
        y += w.N;
        first -= panels_of(w);
        last -= panels_of(w);
    }
}

// --------------------------------------------------------------------------------------- attention
// y (n,) = LayerNorm or RMSNorm of x (n,).
static void normalize(const float *x, Norm norm, int n, float eps, float *y) {
    Floats sum = {}, squares = {};
    if (norm.bias)
        for (int i = 0; i < n; i += W)
            sum += load<Floats>(x + i);
    const float mean = add(sum) / n;
    for (int i = 0; i < n; i += W) {
        Floats v = load<Floats>(x + i) - mean;
        squares += v * v;
    }
    const float factor = 1 / std::sqrt(add(squares) / n + eps);
    for (int i = 0; i < n; i += W) {
        const Floats v = (load<Floats>(x + i) - mean) * factor * load<Floats>(norm.gain + i);
        store(y + i, norm.bias ? v + load<Floats>(norm.bias + i) : v);
    }
}

// One head, rotated by its position if the model does that, times a factor.
static void rotate(const float *x, const float *cos, const float *sin, int D, float scale,
                   float *y) {
    if (!cos)
        for (int i = 0; i < D; i++)
            y[i] = x[i] * scale;
    const int half = cos ? D / 2 : 0;
    for (int i = 0; i < half; i++) {
        y[i] = (x[i] * cos[i] + x[i + half] * sin[i]) * scale;
        y[i + half] = (x[i + half] * cos[i + half] + x[i] * sin[i + half]) * scale;
    }
}

static inline Floats load_cached(const float *p) { return load<Floats>(p); }
static inline Floats load_cached(const uint16_t *p) { return load_half(p); }
static inline void store_cached(float *p, float x) { *p = x; }
static inline void store_cached(uint16_t *p, float x) {
#if defined(__F16C__)
    *p = _cvtss_sh(x, 0);
#else
    _Float16 h = x;
    memcpy(p, &h, 2);
#endif
}

// B vectors of y from d on, for R queries: y = y * correction + sum over keys of p * value.
template <int R, int B, class Cached>
static inline void add_values(const Cached *const *pages, int count, const float (*p)[CHUNK * PAGE],
                              const float *correction, int D, int d, float *const *y) {
    Floats o[R][B];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < B; v++)
            o[r][v] = load<Floats>(y[r] + d + v * W) * correction[r];
    for (int b = 0; b < count; b++)
        for (int i = 0; i < PAGE; i++)
            for (int v = 0; v < B; v++) {
                const Floats value = load_cached(pages[b] + i * D + d + v * W);
                for (int r = 0; r < R; r++)
                    o[r][v] += p[r][b * PAGE + i] * value;
            }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < B; v++)
            store(y[r] + d + v * W, o[r][v]);
}

// The scores of R queries with the keys of one page, into p[r] from `at` on; hidden keys get -inf.
template <int R, class Cached>
static inline void score_page(const float *const *q, const int *past, const Cached *keys, int D,
                              int window, int at, float (*p)[CHUNK * PAGE]) {
    constexpr int V = PAGE / W;
    // Two sums, so that an addition need not wait for the one before it.
    Floats even[R][V] = {};
    Floats odd[R][V] = {};
    for (int d = 0; d < D; d += 2)
        for (int v = 0; v < V; v++) {
            const Floats k = load_cached(keys + d * PAGE + v * W);
            const Floats next = load_cached(keys + (d + 1) * PAGE + v * W);
            for (int r = 0; r < R; r++) {
                even[r][v] += q[r][d] * k;
                odd[r][v] += q[r][d + 1] * next;
            }
        }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++)
            store(p[r] + at + v * W, even[r][v] + odd[r][v]);
        // Of this page's keys those from past - window + 1 to past are seen.
        for (int i = std::max(0, past[r] + 1); i < PAGE; i++)
            p[r][at + i] = -INFINITY;
        for (int i = 0; i <= std::min(PAGE - 1, past[r] - window); i++)
            p[r][at + i] = -INFINITY;
    }
}

// R queries (rows of q, D wide, positions rising) over the pages of one sequence and key head, with
// a running softmax (Milakov & Gimelshein 2018): y = sum of exp(s - max) v / sum of exp(s - max).
// Where a chunk of pages raises the maximum, the sums so far are corrected.
template <int R, class Cached>
static void attend(const float *const *q, const int *position, float *const *y, const Layer &layer,
                   const Model &m, int head, const int32_t *blocks) {
    const int D = m.D;
    const int window = layer.window ? layer.window : 1 << 30;
    float top[R];
    Floats total[R] = {};
    for (int r = 0; r < R; r++) {
        top[r] = -1e30f;
        std::fill(y[r], y[r] + D, 0.0f);
    }
    const int last = position[R - 1] / PAGE;
    int b = std::max(0, position[0] - window + 1) / PAGE;
    while (b <= last) {
        const int end = std::min(last + 1, b / CHUNK * CHUNK + CHUNK);
        const int count = end - b;
        alignas(64) float p[R][CHUNK * PAGE];
        const Cached *values[CHUNK];
        float correction[R];
        for (int c = 0; c < count; c++) {
            const size_t at = (size_t(blocks[b + c]) * m.KV + head) * D * PAGE;
            values[c] = (const Cached *)layer.values + at;
            int past[R];  // each query's place, counted from this page's first key
            for (int r = 0; r < R; r++)
                past[r] = position[r] - (b + c) * PAGE;
            score_page<R>(q, past, (const Cached *)layer.keys + at, D, window, c * PAGE, p);
        }
        for (int r = 0; r < R; r++) {
            Floats most = load<Floats>(p[r]);
            for (int i = W; i < count * PAGE; i += W)
                most = larger(most, load<Floats>(p[r] + i));
            const float now = std::max(top[r], largest(most));
            correction[r] = exp(all(top[r] - now))[0];
            total[r] *= correction[r];
            top[r] = now;
            for (int i = 0; i < count * PAGE; i += W) {
                const Floats e = exp(load<Floats>(p[r] + i) - now);
                total[r] += e;
                store(p[r] + i, e);
            }
        }
        int d = 0;
        for (; d + 4 * W <= D; d += 4 * W)
            add_values<R, 4, Cached>(values, count, p, correction, D, d, y);
        for (; d < D; d += W)
            add_values<R, 1, Cached>(values, count, p, correction, D, d, y);
        b = end;
    }
    for (int r = 0; r < R; r++)
        for (int d = 0; d < D; d += W)
            store(y[r] + d, load<Floats>(y[r] + d) / add(total[r]));
}

template <class Cached>
static void attend_rows(int n, const float *const *q, const int *position, float *const *y,
                        const Layer &layer, const Model &m, int head, const int32_t *blocks) {
    if (n == 4)
        attend<4, Cached>(q, position, y, layer, m, head, blocks);
    else if (n == 3)
        attend<3, Cached>(q, position, y, layer, m, head, blocks);
    else if (n == 2)
        attend<2, Cached>(q, position, y, layer, m, head, blocks);
    else
        attend<1, Cached>(q, position, y, layer, m, head, blocks);
}

// The queries of tokens first..last-1 of a span and of all heads that share key head `head`.
static void attend_some(const Model &m, const Layer &layer, const Span &span, int first, int last,
                        int head, const int32_t *blocks, const float *qkv, float *out) {
    const int shared = m.H / m.KV;
    const int width = (m.H + 2 * m.KV) * m.D;
    const int rows = (last - first) * shared;
    for (int row = 0; row < rows; row += 4) {
        const float *q[4];
        float *y[4];
        int position[4];
        const int n = std::min(4, rows - row);
        for (int r = 0; r < n; r++) {
            const int t = first + (row + r) / shared;
            const int h = head * shared + (row + r) % shared;
            q[r] = qkv + size_t(span.start + t) * width + h * m.D;
            y[r] = out + (size_t(span.start + t) * m.H + h) * m.D;
            position[r] = span.past + t;
        }
        if (m.cached == FLOAT16)
            attend_rows<uint16_t>(n, q, position, y, layer, m, head, blocks);
        else
            attend_rows<float>(n, q, position, y, layer, m, head, blocks);
    }
}

// Rotates a token's queries in place, and stores its keys and values in their page. at: the token's
// position; block: the page it belongs to.
template <class Cached>
static void store_token(const Model &m, const Layer &layer, float *row, int at, size_t block) {
    const int D = m.D;
    const int slot = at % PAGE;
    const float *cos = m.cos ? m.cos + size_t(at) * D : nullptr;
    const float *sin = m.sin + size_t(at) * D;
    alignas(64) float turned[512];
    for (int h = 0; h < m.H + m.KV; h++) {
        const bool query = h < m.H;
        float *head = row + h * D;
        const Norm norm = query ? layer.q_norm : layer.k_norm;
        if (norm.gain)
            normalize(head, norm, D, m.eps, head);
        rotate(head, cos, sin, D, query ? 1 / std::sqrt(float(D)) : 1, turned);
        if (query) {
            memcpy(head, turned, D * sizeof(float));
        } else {
            Cached *page = (Cached *)layer.keys + (block * m.KV + h - m.H) * D * PAGE + slot;
            for (int d = 0; d < D; d++)
                store_cached(page + d * PAGE, turned[d]);
        }
    }
    for (int h = 0; h < m.KV; h++) {
        Cached *page = (Cached *)layer.values + ((block * m.KV + h) * PAGE + slot) * D;
        for (int d = 0; d < D; d++)
            store_cached(page + d, row[(m.H + m.KV + h) * D + d]);
    }
}

// ---------------------------------------------------------------------------------------- the pass
template <class V>
static void grow(V &v, size_t size) {
    if (v.size() < size)
        v.resize(size);
}

// Room for T tokens as these layers read them.
static void make_room(const Linear *layers, int count, int T, const int32_t *adapters,
                      Prepared *to) {
    for (int j = 0; j < count; j++) {
        const Linear &w = layers[j];
        to[j].adapters = adapters;
        grow(to[j].low, size_t(T) * w.rank);
        if (!w.N || w.kind < INT8)
            continue;
        const size_t groups = size_t(T) * (w.K / w.group);
        grow(to[j].q, size_t(T) * w.K);
        grow(to[j].scale, groups);
        grow(to[j].sum, groups);
    }
}

// Token t's inputs of some layers, made ready for their products.
static inline void prepare_row(const Linear *layers, int count, const float *x, int t,
                               Prepared *to) {
    for (int j = 0; j < count; j++) {
        if (layers[j].N && layers[j].kind >= INT8)
            round_row(layers[j], x, t, to[j]);
        if (layers[j].N && layers[j].rank)
            adapt_row(layers[j], x, t, to[j]);
    }
}

// The MLP's nonlinearity, in place over `gate`: SwiGLU (Shazeer 2020), or without values GELU in
// its tanh form; 1.59576912 is 2 sqrt(2 / pi).
static void activate(float *gate, const float *value, int n) {
    for (int k = 0; k < n; k += W) {
        const Floats g = load<Floats>(gate + k);
        if (value)
            store(gate + k, g / (1.0f + exp(-g)) * load<Floats>(value + k));
        else
            store(gate + k, g / (1.0f + exp(-1.59576912f * (g + 0.044715f * g * g * g))));
    }
}

extern "C" int lanes() { return W; }

// Work for attention: tokens first..last-1 of a sequence, with one key head.
struct Unit {
    int span, first, last, head;
};
constexpr int UNIT = 16;  // the most tokens of one

// A step: the tokens of all sequences, what lies between the layers, and the loops over both.
struct Step {
    const Model &m;
    const int T, C, qkv_width, attended_width;
    const int32_t *adapters;
    std::vector<float> x;                 // (T, C), the residual stream
    std::vector<float> normed;            // (T, C); at the end (R, C), what the head reads
    std::vector<float> qkv;               // (T, qkv_width)
    std::vector<float> attended;          // (T, attended_width)
    std::vector<float> up;                // (T, 2M), or (T, M) for a product of floats
    std::vector<int> span_of, positions;  // of each token
    std::vector<Unit> units;              // of each sequence those with most keys first
    Prepared prepared[3];

    Step(const Model &model, int T, const int32_t *adapters, int S, const Span *spans, int R)
        : m(model),
          T(T),
          C(m.C),
          qkv_width((m.H + 2 * m.KV) * m.D),
          attended_width(m.H * m.D),
          adapters(adapters),
          x(size_t(T) * C),
          normed(size_t(std::max(T, R)) * C),
          qkv(size_t(T) * qkv_width),
          attended(size_t(T) * attended_width),
          up(size_t(T) * 2 * m.M),
          span_of(T),
          positions(T) {
        for (int s = 0; s < S; s++) {
            for (int i = 0; i < spans[s].n; i++) {
                span_of[spans[s].start + i] = s;
                positions[spans[s].start + i] = spans[s].past + i;
            }
            for (int last = spans[s].n; last > 0; last -= UNIT)
                for (int h = 0; h < m.KV; h++)
                    units.push_back({s, std::max(0, last - UNIT), last, h});
        }
        for (int i = 0; i < m.L; i++) {
            make_room(m.layers[i].qkv, 3, T, adapters, prepared);
            make_room(m.layers[i].up, 2, T, adapters, prepared);
            make_room(&m.layers[i].out, 1, T, adapters, prepared);
            make_room(&m.layers[i].down, 1, T, adapters, prepared);
        }
    }
};

// ids, adapters (T,); spans (S,); blocks: their lists one after the other; rows (R,): the tokens
// that are wanted. Writes their logits (R, V) or, with `hidden`, what the head reads (R, C).
extern "C" void forward(const Model *model, int T, const int64_t *ids, const int32_t *adapters,
                        int S, const Span *spans, const int32_t *blocks, int R, const int64_t *rows,
                        float *out, int hidden, int threads) {
    const Model &m = *model;
    Step step(m, T, adapters, S, spans, R);
    const int C = m.C;
    std::vector<float> &x = step.x, &normed = step.normed, &qkv = step.qkv;
    std::vector<float> &attended = step.attended, &up = step.up;
    Prepared *prepared = step.prepared;
    Prepared for_head[1];
    std::vector<int32_t> row_adapters(R);
    for (int r = 0; r < R; r++)
        row_adapters[r] = adapters[rows[r]];
    make_room(&m.head, 1, R, row_adapters.data(), for_head);

    Team &team = Team::only();
    team.run(threads, 3 + 11 * m.L, [&](int me) {
        int phase = 0;  // each thread counts for itself: all go through the same phases
        // f(t) for each of some tokens.
        auto each = [&](int count, auto f) {
            const int grain = std::max(8, count / (4 * threads));
            team.share(phase++, me, count, grain, [&](int first, int last) {
                for (int t = first; t < last; t++)
                    f(t);
            });
        };
        // Some layers with the same inputs, of which a thread takes so many panels at a time that
        // they cost it some 10 microseconds.
        auto multiply = [&](const Linear *layers, int n, const float *from, const Prepared *codes,
                            int rows, float *to, size_t stride, bool onto) {
            int count = 0;
            for (int j = 0; j < n; j++)
                count += panels_of(layers[j]);
            const int grain = 4 + (1 << 19) / (int64_t(layers->K) * W * rows + 1) / 4 * 4;
            team.share(phase++, me, count, grain, [&](int first, int last) {
                products(layers, n, from, codes, rows, to, stride, onto, first, last);
            });
        };
        each(T, [&](int t) {
            const float *place = m.places ? m.places + size_t(step.positions[t]) * C : nullptr;
            for (int k = 0; k < C; k++)
                x[size_t(t) * C + k] = m.embed[ids[t] * C + k] + (place ? place[k] : 0);
        });
        for (int i = 0; i < m.L; i++) {
            Layer layer = m.layers[i];
            layer.keys = m.cache + i * m.layer_bytes;
            layer.values = m.cache + (m.L + i) * m.layer_bytes;
            // Attention: x += out(attend(qkv(norm1(x)))).
            each(T, [&](int t) {
                normalize(&x[size_t(t) * C], layer.norm1, C, m.eps, &normed[size_t(t) * C]);
                prepare_row(layer.qkv, 3, &normed[size_t(t) * C], t, prepared);
            });
            multiply(layer.qkv, 3, normed.data(), prepared, T, qkv.data(), step.qkv_width, false);
            each(T, [&](int t) {
                const int at = step.positions[t];
                const int block = blocks[spans[step.span_of[t]].blocks + at / PAGE];
                float *row = &qkv[size_t(t) * step.qkv_width];
                if (m.cached == FLOAT16)
                    store_token<uint16_t>(m, layer, row, at, block);
                else
                    store_token<float>(m, layer, row, at, block);
            });
            team.share(phase++, me, step.units.size(), 1, [&](int u, int) {
                const Unit &unit = step.units[u];
                const Span &span = spans[unit.span];
                attend_some(m, layer, span, unit.first, unit.last, unit.head, blocks + span.blocks,
                            qkv.data(), attended.data());
            });
            each(T, [&](int t) {
                prepare_row(&layer.out, 1, &attended[size_t(t) * step.attended_width], t, prepared);
            });
            multiply(&layer.out, 1, attended.data(), prepared, T, x.data(), C, true);
            // The MLP: x += down(activate(up(norm2(x)))).
            each(T, [&](int t) {
                normalize(&x[size_t(t) * C], layer.norm2, C, m.eps, &normed[size_t(t) * C]);
                prepare_row(layer.up, 2, &normed[size_t(t) * C], t, prepared);
            });
            multiply(layer.up, 2, normed.data(), prepared, T, up.data(), 2 * m.M, false);
            each(T, [&](int t) {  // into the first M of the token's 2M
                float *gate = &up[size_t(t) * 2 * m.M];
                activate(gate, layer.up[1].N ? gate + m.M : nullptr, m.M);
                prepare_row(&layer.down, 1, gate, t, prepared);
            });
            if (layer.down.kind < INT8)  // a product of floats reads rows of M
                each(1, [&](int) {
                    for (int t = 1; t < T; t++)
                        memcpy(&up[size_t(t) * m.M], &up[size_t(t) * 2 * m.M], m.M * sizeof(float));
                });
            multiply(&layer.down, 1, up.data(), prepared, T, x.data(), C, true);
        }
        each(R, [&](int r) {
            normalize(&x[rows[r] * C], m.norm, C, m.eps, &normed[size_t(r) * C]);
            prepare_row(&m.head, 1, &normed[size_t(r) * C], r, for_head);
        });
        if (!hidden)
            multiply(&m.head, 1, normed.data(), for_head, R, out, m.head.N, false);
    });
    if (hidden)
        memcpy(out, normed.data(), size_t(R) * C * sizeof(float));
}
