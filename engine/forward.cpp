// The forward pass of the engine on a CPU: every token of a step, of however many sequences, through the whole Transformer in
// one call, over the paged cache. native.py compiles this file on first use and packs a model for it; runner.py's forward in
// torch says the same and is what runs where there is no compiler. tests/test_native.py compares the two.
//
// A step is bound by the way of the weights from memory when few texts are written, by multiplications when prompts are read.
// So weights lie exactly in the order in which they are used: W output rows (the lanes of a vector) side by side, all inputs of
// these rows one after the other ("a panel"). A panel is multiplied with up to 8 tokens at once, which costs its bytes once.
//
// No result depends on what else is in the batch: each token's sums are taken in the same order whoever its neighbours are.
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
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// ---------------------------------------------------------------------------------------------------------------- vectors
#if defined(__AVX512VNNI__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));      // W lanes, one output row each
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint8_t Codes __attribute__((vector_size(4 * W)));     // 4 unsigned codes a lane
typedef uint16_t Shifts __attribute__((vector_size(4 * W)));
constexpr int PAGE = 16, CHUNK = 8;                            // tokens of a block of the cache; blocks between two corrections

template <class V> static inline V load(const void *p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V> static inline void store(void *p, V v) { memcpy(p, &v, sizeof v); }
static inline Floats all(float x) { return x - Floats{}; }

static inline Floats load_half(const uint16_t *p) {            // W float16 -> float32
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    Floats y;
    for (int i = 0; i < W; i++) { _Float16 h; memcpy(&h, p + i, 2); y[i] = h; }
    return y;
#endif
}

// Of every lane: sum += the dot product of its 4 codes (BITS of them used, unsigned) with the 4 signed bytes at q.
template <int BITS> static inline Ints dot4(Ints sum, Codes codes, const int8_t *q) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(load<int32_t>(q)));
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(load<int32_t>(q)));
#elif defined(__AVX2__)  // pairs are added in 16 bits, where 15 * 127 * 2 fits and 255 * 127 * 2 does not: a nibble at a time
    __m256i four = _mm256_set1_epi32(load<int32_t>(q)), c = (__m256i)codes, low = _mm256_set1_epi8(15);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(c, low), four);
    sum += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    if (BITS == 4) return sum;
    pairs = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c, 4), low), four);
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(16));
#else
    for (int i = 0; i < W; i++)
        for (int j = 0; j < 4; j++) sum[i] += int(codes[4 * i + j]) * q[j];
    return sum;
#endif
}

static inline float add(Floats v) { float s = 0; for (int i = 0; i < W; i++) s += v[i]; return s; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline float largest(Floats v) { float s = v[0]; for (int i = 1; i < W; i++) s = std::max(s, v[i]); return s; }

static inline Floats exp(Floats x) {  // 2^n e^r with |r| <= ln(2) / 2 and Cephes' polynomial for e^r: within 2e-7
    const Floats given = x;
    x = larger(x, all(-87.0f));
    x = x < 88.0f ? x : all(88.0f);
    const Floats magic = all(12582912.0f), n = x * 1.44269504f + magic - magic;  // adding 1.5 * 2^23 rounds to an integer
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return given < -87.0f ? Floats{} : (Floats)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}

// ---------------------------------------------------------------------------------------------------------------- threads
// Threads that stay: a step has hundreds of phases, and between two of them all should meet in less than a microsecond. OpenMP's would
// do in the main thread; called from another one, as in a server, its pools count as more threads than there are cores and go to sleep
// at every barrier (5 times slower). Each thread has its share of a phase's items, so that what it reads stays in its own cache; who is
// done takes from the others. A thread whose core was busy with something else when the step began finds the first phases done, and
// nobody has waited for it. While the engine steps, torch has one thread (native.quiet_torch): two sets of spinning threads would get
// in each other's way.
struct Team {
    std::mutex turn, sleep;
    std::condition_variable wake;
    std::atomic<uint64_t> round{0};                // its number and, in the low 16 bits, how many threads may take part: 0 once it is over
    std::atomic<int> inside{0};                    // helpers in the round
    int size = 1;                                  // threads of the round
    const std::function<void(int)> *job = nullptr;
    std::vector<std::atomic<int>> taken, done;     // items of each share of each phase that somebody has begun; of each phase, done
    std::vector<std::thread::native_handle_type> helpers;
    std::vector<int> cores;                        // the caller's and the helpers'; fewer than threads: no thread keeps to one

    static Team &only() { static Team *team = new Team; return *team; }  // never destroyed: its threads never end

    // Within a step nobody yields: where something else wants the core, who yields may be gone for a time slice
    void pause(int i, bool within) {
#if defined(__x86_64__)
        if (i < 400 || within && cores.size() > helpers.size()) return _mm_pause();
#endif
        std::this_thread::yield();
    }

    // f(first, last) for all of 0..count-1, up to `grain` at a time; returns when all are done
    template <class F> void share(int phase, int me, int count, int grain, F f) {
        int made = 0;
        for (int k = 0; k < size; k++) {
            const int whose = (me + k) % size, begin = int64_t(count) * whose / size, end = int64_t(count) * (whose + 1) / size;
            std::atomic<int> &next = taken[phase * size + whose];
            while (begin + next < end) {
                const int first = begin + next.fetch_add(grain), last = std::min(first + grain, end);
                if (first < last) f(first, last), made += last - first;
            }
        }
        if (made) done[phase] += made;
        for (int i = 0; done[phase] < count; i++) pause(i, true);
    }

    void work(int me, uint64_t seen) {
        for (;;) {
            for (int i = 0; round == seen; i++) {  // spin for some microseconds, then let others run, and go to sleep at last
                if (i < 10000) { pause(i, false); continue; }
                std::unique_lock<std::mutex> lock(sleep);
                wake.wait(lock, [&] { return round != seen; });
            }
            seen = round;
            if (me >= int(seen & 0xffff)) continue;
            inside++;
            if (round == seen) (*job)(me);  // else it is over, and what the job refers to is gone
            inside--;
        }
    }

    // Each on a core of its own: a thread that wakes while something else is on its core would be put onto the caller's, and the two
    // take turns. The caller goes where the system likes; who is there changes places with it.
    void spread() {
#if defined(__linux__)
        const int here = sched_getcpu();
        if (!cores.empty() && here == cores[0]) return;
        cpu_set_t set;
        if (cores.empty() && !sched_getaffinity(0, sizeof set, &set))
            for (int c = 0; c < CPU_SETSIZE; c++) if (CPU_ISSET(c, &set)) cores.push_back(c);
        if (cores.size() <= helpers.size()) return;
        std::swap(cores[0], *std::find(cores.begin(), cores.end() - 1, here));
        for (size_t i = 0; i < helpers.size(); i++) {
            CPU_ZERO(&set);
            CPU_SET(cores[i + 1], &set);
            pthread_setaffinity_np(helpers[i], sizeof set, &set);
        }
#endif
    }

    void run(int threads, size_t phases, const std::function<void(int)> &f) {  // f(0), ..., f(threads - 1) at once, if they come in time
        std::lock_guard<std::mutex> mine(turn);
        while (int(helpers.size()) < threads - 1) {
            std::thread helper(&Team::work, this, int(helpers.size()) + 1, uint64_t(round));
            helpers.push_back(helper.native_handle());
            helper.detach();
            cores.clear();
        }
        spread();
        if (taken.size() < phases * threads) taken = std::vector<std::atomic<int>>(phases * threads);
        if (done.size() < phases) done = std::vector<std::atomic<int>>(phases);
        for (auto &n : taken) n.store(0, std::memory_order_relaxed);
        for (auto &n : done) n.store(0, std::memory_order_relaxed);
        const uint64_t number = ((round >> 16) + 1) << 16;
        {
            std::lock_guard<std::mutex> lock(sleep);
            job = &f, size = threads, round = number | threads;
        }
        wake.notify_all();
        f(0);
        round = number;
        for (int i = 0; inside; i++) pause(i, true);
    }
};

// ------------------------------------------------------------------------------------------------------------------ nouns
enum Kind { FLOAT32 = 0, FLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Linear {              // (T, K) -> (T, N); native.py's class of the same name
    int32_t kind, N, K;
    int32_t group;           // inputs that share a scale and a zero point; a multiple of 8. K here is padded to a multiple of it
    const uint8_t *weight;   // panels (N/W, K, W); INT8: (N/W, K/4, W, 4); INT4: (N/W, K/8, W, 4), inputs 4-7 in the high halves
    const uint16_t *scale;   // (N/W, K/group, W) float16: w = scale * (code - zero)
    const uint16_t *zero;    // (N/W, K/group, W) float16
    const int32_t *order;    // (inputs,) packed column j is input order[j]; null: as they come
    const float *bias;       // (N,) or null
    int32_t inputs;          // K before padding
    int32_t rank;            // of all LoRA adapters together, 0: none. Row a of keep is adapter a's, the last is no adapter's:
    const float *a, *b, *keep;  // (rank, inputs), panels (N/W, rank, W), (adapters + 1, rank)
};

struct Norm { const float *gain, *bias; };         // with a bias LayerNorm, without RMSNorm

struct Layer {
    Norm norm1, norm2, q_norm, k_norm;             // of C, C, D, D; no gain: no norm
    Linear qkv[3], out, up[2], down;               // up: gate and value, or without a gate (GPT-2) one alone
    void *keys, *values;                           // pages (blocks, KV, D, PAGE) and (blocks, KV, PAGE, D)
    int64_t window;                                // keys a query sees, itself included; 0: all
};

struct Model {
    int32_t L, C, H, KV, D, M;
    float eps;
    int32_t cached;                                // FLOAT32 or FLOAT16: the type of keys and values
    const float *embed, *places, *cos, *sin;       // (V, C), positions (P, C) or null, (P, D) twice or null; -sin in its first half
    Norm norm;
    Layer *layers;
    Linear head;
};

struct Span {  // the tokens of one sequence in this step
    int32_t start, n, past, blocks;  // first token, how many, tokens in the cache before them, where its block list begins
};

struct Rounded {  // tokens (T, K) as a quantized layer reads them: x = scale * q, a scale for each group
    std::vector<int8_t> q;
    std::vector<float> scale, sum;   // (T, K/group): the step, and the sum of the group's q
    std::vector<float> low;          // (T, rank): what LoRA's first matrix makes of each token, for the ranks of its own adapter
    const int32_t *adapters;         // (T,) row of keep
};

// --------------------------------------------------------------------------------------------------------------- products
static void round_row(const Linear &w, const float *x, int t, Rounded &to) {
    const int groups = w.K / w.group;
    int8_t *q = &to.q[size_t(t) * w.K];
    for (int g = 0; g < groups; g++, q += w.group) {
        float top = 1e-30f;
        alignas(64) float h[8];
        const int n = std::min(w.group, w.inputs - g * w.group), from = g * w.group;
        if (!w.order && n % W == 0) {
            Floats most = {};
            for (int i = 0; i < n; i += W) { Floats v = load<Floats>(x + from + i); most = larger(most, larger(v, -v)); }
            top = std::max(top, largest(most));
        } else
            for (int i = 0; i < n; i++) top = std::max(top, std::fabs(x[w.order ? w.order[from + i] : from + i]));
        const float step = top / 127, inverse = 127 / top;
        int sum = 0;
        for (int i = 0; i < w.group; i += 8) {
            for (int j = 0; j < 8; j++)
                h[j] = i + j < n ? x[w.order ? w.order[from + i + j] : from + i + j] * inverse + 12582912.0f : 12582912.0f;
            for (int j = 0; j < 8; j++) {  // the low bits of 1.5 * 2^23 + x are x, rounded
                int32_t v; memcpy(&v, h + j, 4);
                v -= 0x4B400000;
                q[i + j] = v;
                sum += v;
            }
        }
        to.scale[t * groups + g] = step;
        to.sum[t * groups + g] = sum;
    }
}

static void adapt_row(const Linear &w, const float *x, int t, Rounded &to) {
    const float *keep = w.keep + size_t(to.adapters[t]) * w.rank;
    for (int r = 0; r < w.rank; r++) {
        Floats sum = {};
        if (keep[r] != 0)
            for (int k = 0; k < w.inputs; k += W) sum += load<Floats>(x + k) * load<Floats>(w.a + size_t(r) * w.inputs + k);
        to.low[size_t(t) * w.rank + r] = add(sum) * keep[r];
    }
}

// What LoRA adds to W outputs of a token: y + B (scale A x)
static inline Floats adapted(const Linear &w, int panel, int t, const Rounded &x, Floats y) {
    const float *keep = w.keep + size_t(x.adapters[t]) * w.rank;
    for (int r = 0; r < w.rank; r++)
        if (keep[r] != 0) y += x.low[size_t(t) * w.rank + r] * load<Floats>(w.b + (size_t(panel) * w.rank + r) * W);
    return y;
}

// R tokens times P panels, into y[r][p]
template <int R, int P> static inline void multiply_float(const Linear &w, int panel, const float *x, Floats y[R][P]) {
    const int K = w.K;
    const size_t size = size_t(K) * W;
    for (int r = 0; r < R; r++) for (int p = 0; p < P; p++) y[r][p] = Floats{};
    for (int k = 0; k < K; k++)
        for (int p = 0; p < P; p++) {
            const size_t at = (panel + p) * size + size_t(k) * W;
            const Floats v = w.kind == FLOAT32 ? load<Floats>((const float *)w.weight + at) : load_half((const uint16_t *)w.weight + at);
            for (int r = 0; r < R; r++) y[r][p] += x[size_t(r) * w.inputs + k] * v;
        }
}

template <int BITS, int R, int P> static inline void multiply_codes(const Linear &w, int panel, const Rounded &x, int t, Floats y[R][P]) {
    const int K = w.K, groups = K / w.group;
    const size_t size = size_t(K) * W * BITS / 8;
    const uint8_t *codes = w.weight + panel * size;
    const int8_t *q = &x.q[size_t(t) * K];
    for (int r = 0; r < R; r++) for (int p = 0; p < P; p++) y[r][p] = Floats{};
    for (int g = 0; g < groups; g++) {
        Ints sum[R][P] = {};
        for (int end = (g + 1) * w.group, k = g * w.group; k < end; k += 32 / BITS, codes += 4 * W)
            for (int p = 0; p < P; p++) {
                const Codes c = load<Codes>(codes + p * size);
                if (BITS == 8) {
                    for (int r = 0; r < R; r++) sum[r][p] = dot4<8>(sum[r][p], c, q + size_t(r) * K + k);
                } else {
                    const Codes low = c & 15, high = (Codes)((Shifts)c >> 4) & 15;
                    for (int r = 0; r < R; r++) {
                        sum[r][p] = dot4<4>(sum[r][p], low, q + size_t(r) * K + k);
                        sum[r][p] = dot4<4>(sum[r][p], high, q + size_t(r) * K + k + 4);
                    }
                }
            }
        for (int p = 0; p < P; p++) {  // sum of scale * (code - zero) * x = scale * step * (sum of code * q - zero * sum of q)
            const size_t at = (size_t(panel + p) * groups + g) * W;
            const Floats scale = load_half(w.scale + at), zero = load_half(w.zero + at);
            for (int r = 0; r < R; r++) {
                const size_t row = size_t(t + r) * groups + g;
                y[r][p] += (__builtin_convertvector(sum[r][p], Floats) - zero * x.sum[row]) * (scale * x.scale[row]);
            }
        }
    }
}

template <int R, int P> static inline void block(const Linear &w, int panel, const float *x, const Rounded &rounded, int t, float *y,
                                                 size_t stride, bool onto) {
    Floats sums[R][P];
    if (w.kind == INT8) multiply_codes<8, R, P>(w, panel, rounded, t, sums);
    else if (w.kind == INT4) multiply_codes<4, R, P>(w, panel, rounded, t, sums);
    else multiply_float<R, P>(w, panel, x + size_t(t) * w.inputs, sums);
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
            const int n = (panel + p) * W, lanes = std::min(W, w.N - n);
            float *to = y + (t + r) * stride + n;
            if (w.rank) sums[r][p] = adapted(w, panel + p, t + r, rounded, sums[r][p]);
            if (lanes == W) {
                if (w.bias) sums[r][p] += load<Floats>(w.bias + n);
                store(to, onto ? load<Floats>(to) + sums[r][p] : sums[r][p]);
            } else
                for (int i = 0; i < lanes; i++) to[i] = sums[r][p][i] + (w.bias ? w.bias[n + i] : 0) + (onto ? to[i] : 0);
        }
}

template <int R> static inline int panels(const Linear &w, int panel, int end, const float *x, const Rounded &rounded, int t, float *y,
                                          size_t stride, bool onto) {
    constexpr int P = R == 1 ? 4 : 2;  // enough sums at once to hide the latency of an addition, few enough for the registers
    if (panel + P > end) { block<R, 1>(w, panel, x, rounded, t, y, stride, onto); return 1; }
    block<R, P>(w, panel, x, rounded, t, y, stride, onto);
    return P;
}

static inline int panels_of(const Linear &w) { return (w.N + W - 1) / W; }

// Panels first..last-1 of y (T, N) = x (T, K) times W, or with `onto` y += that. Of several layers with the same inputs, one after the
// other in y, they are counted through.
static void products(const Linear *layers, int count, const float *x, const Rounded *rounded, int T, float *y, size_t stride, bool onto,
                     int first, int last) {
    for (int j = 0; j < count && first < last; y += layers[j].N, first -= panels_of(layers[j]), last -= panels_of(layers[j]), j++) {
        const Linear &w = layers[j];
        const int end = std::min(last, panels_of(w));
        for (int panel = std::max(first, 0), done; panel < end; panel += done) {
            int t = 0;
            const int most = T == 1 ? 4 : 2, step = std::min(most, end - panel) == most ? most : 1;
            for (done = step; t < T;) {
                const int stop = panel + step;
                if (T - t >= 8) panels<8>(w, panel, stop, x, rounded[j], t, y, stride, onto), t += 8;
                else if (T - t >= 4) panels<4>(w, panel, stop, x, rounded[j], t, y, stride, onto), t += 4;
                else if (T - t >= 2) panels<2>(w, panel, stop, x, rounded[j], t, y, stride, onto), t += 2;
                else {
                    for (int p = panel; p < stop;) p += panels<1>(w, p, stop, x, rounded[j], t, y, stride, onto);
                    t += 1;
                }
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- attention
static void normalize(const float *x, Norm norm, int n, float eps, float *y) {
    Floats sum = {}, squares = {};
    if (norm.bias) for (int i = 0; i < n; i += W) sum += load<Floats>(x + i);
    const float mean = add(sum) / n;
    for (int i = 0; i < n; i += W) { Floats v = load<Floats>(x + i) - mean; squares += v * v; }
    const float factor = 1 / std::sqrt(add(squares) / n + eps);
    for (int i = 0; i < n; i += W) {
        const Floats v = (load<Floats>(x + i) - mean) * factor * load<Floats>(norm.gain + i);
        store(y + i, norm.bias ? v + load<Floats>(norm.bias + i) : v);
    }
}

// Of one head: the Transformer's rotation by position, if it has one, and a factor
static void rotate(const float *x, const float *cos, const float *sin, int D, float scale, float *y) {
    if (!cos) for (int i = 0; i < D; i++) y[i] = x[i] * scale;
    for (int i = 0, half = cos ? D / 2 : 0; i < half; i++) {
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

// B vectors of y, from d on, of R queries: y = y * correction + sum over keys of p * value
template <int R, int B, class Cached> static inline void add_values(const Cached *const *pages, int count, const float (*p)[CHUNK * PAGE],
                                                                    const float *correction, int D, int d, float *const *y) {
    Floats o[R][B];
    for (int r = 0; r < R; r++) for (int v = 0; v < B; v++) o[r][v] = load<Floats>(y[r] + d + v * W) * correction[r];
    for (int b = 0; b < count; b++)
        for (int i = 0; i < PAGE; i++)
            for (int v = 0; v < B; v++) {
                const Floats value = load_cached(pages[b] + i * D + d + v * W);
                for (int r = 0; r < R; r++) o[r][v] += p[r][b * PAGE + i] * value;
            }
    for (int r = 0; r < R; r++) for (int v = 0; v < B; v++) store(y[r] + d + v * W, o[r][v]);
}

// R queries (rows of q, D wide, positions rising) over the pages of one sequence and key head, with a running softmax (Milakov &
// Gimelshein 2018): y = sum of exp(s - max) v / sum of exp(s - max), corrected where a chunk of pages raises the maximum
template <int R, class Cached> static void attend(const float *const *q, const int *position, float *const *y, const Layer &layer,
                                                  const Model &m, int head, const int32_t *blocks) {
    const int D = m.D, window = layer.window ? layer.window : 1 << 30;
    constexpr int V = PAGE / W;
    float top[R];
    Floats total[R] = {};
    for (int r = 0; r < R; r++) {
        top[r] = -1e30f;
        std::fill(y[r], y[r] + D, 0.0f);
    }
    for (int b = std::max(0, position[0] - window + 1) / PAGE, last = position[R - 1] / PAGE; b <= last;) {
        const int end = std::min(last + 1, b / CHUNK * CHUNK + CHUNK), count = end - b;
        alignas(64) float p[R][CHUNK * PAGE];
        const Cached *values[CHUNK];
        float correction[R];
        for (int c = 0; c < count; c++) {
            const size_t at = (size_t(blocks[b + c]) * m.KV + head) * D * PAGE;
            const Cached *keys = (const Cached *)layer.keys + at;
            values[c] = (const Cached *)layer.values + at;
            Floats s[R][V] = {}, odd[R][V] = {};  // two sums, so that an addition need not wait for the one before it
            for (int d = 0; d < D; d += 2)
                for (int v = 0; v < V; v++) {
                    const Floats k = load_cached(keys + d * PAGE + v * W), next = load_cached(keys + (d + 1) * PAGE + v * W);
                    for (int r = 0; r < R; r++) s[r][v] += q[r][d] * k, odd[r][v] += q[r][d + 1] * next;
                }
            for (int r = 0; r < R; r++) {
                for (int v = 0; v < V; v++) store(p[r] + c * PAGE + v * W, s[r][v] + odd[r][v]);
                const int past = position[r] - (b + c) * PAGE;  // of this page's keys those from past - window + 1 to past are seen
                for (int i = std::max(0, past + 1); i < PAGE; i++) p[r][c * PAGE + i] = -INFINITY;
                for (int i = 0; i <= std::min(PAGE - 1, past - window); i++) p[r][c * PAGE + i] = -INFINITY;
            }
        }
        for (int r = 0; r < R; r++) {
            Floats most = load<Floats>(p[r]);
            for (int i = W; i < count * PAGE; i += W) most = larger(most, load<Floats>(p[r] + i));
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
        for (; d + 4 * W <= D; d += 4 * W) add_values<R, 4, Cached>(values, count, p, correction, D, d, y);
        for (; d < D; d += W) add_values<R, 1, Cached>(values, count, p, correction, D, d, y);
        b = end;
    }
    for (int r = 0; r < R; r++)
        for (int d = 0; d < D; d += W) store(y[r] + d, load<Floats>(y[r] + d) / add(total[r]));
}

template <class Cached> static void attend_rows(int n, const float *const *q, const int *position, float *const *y, const Layer &layer,
                                                const Model &m, int head, const int32_t *blocks) {
    if (n == 4) attend<4, Cached>(q, position, y, layer, m, head, blocks);
    else if (n == 3) attend<3, Cached>(q, position, y, layer, m, head, blocks);
    else if (n == 2) attend<2, Cached>(q, position, y, layer, m, head, blocks);
    else attend<1, Cached>(q, position, y, layer, m, head, blocks);
}

// Queries of tokens first..last of a span and of all heads that share key head `head`
static void attend_some(const Model &m, const Layer &layer, const Span &span, int first, int last, int head, const int32_t *blocks,
                        const float *qkv, float *out) {
    const int shared = m.H / m.KV, width = (m.H + 2 * m.KV) * m.D, rows = (last - first) * shared;
    for (int row = 0, n; row < rows; row += n) {
        const float *q[4];
        float *y[4];
        int position[4];
        n = std::min(4, rows - row);
        for (int r = 0; r < n; r++) {
            const int t = first + (row + r) / shared, h = head * shared + (row + r) % shared;
            q[r] = qkv + size_t(span.start + t) * width + h * m.D;
            y[r] = out + (size_t(span.start + t) * m.H + h) * m.D;
            position[r] = span.past + t;
        }
        (m.cached == FLOAT16 ? attend_rows<uint16_t> : attend_rows<float>)(n, q, position, y, layer, m, head, blocks);
    }
}

// A token's queries are rotated in place; its keys and values go to their page
template <class Cached> static void remember(const Model &m, const Layer &layer, float *row, int at, size_t block) {
    const int D = m.D, slot = at % PAGE;
    alignas(64) float turned[512];
    for (int h = 0; h < m.H + m.KV; h++) {
        float *head = row + h * D;
        const Norm norm = h < m.H ? layer.q_norm : layer.k_norm;
        if (norm.gain) normalize(head, norm, D, m.eps, head);
        rotate(head, m.cos ? m.cos + size_t(at) * D : nullptr, m.sin + size_t(at) * D, D, h < m.H ? 1 / std::sqrt(float(D)) : 1, turned);
        if (h < m.H) memcpy(head, turned, D * sizeof(float));
        else {
            Cached *page = (Cached *)layer.keys + (block * m.KV + h - m.H) * D * PAGE + slot;
            for (int d = 0; d < D; d++) store_cached(page + d * PAGE, turned[d]);
        }
    }
    for (int h = 0; h < m.KV; h++) {
        Cached *page = (Cached *)layer.values + ((block * m.KV + h) * PAGE + slot) * D;
        for (int d = 0; d < D; d++) store_cached(page + d, row[(m.H + m.KV + h) * D + d]);
    }
}

// -------------------------------------------------------------------------------------------------------------- the pass
static void make_room(const Linear *layers, int count, int T, const int32_t *adapters, Rounded *to) {
    for (int j = 0; j < count; j++) {
        const Linear &w = layers[j];
        to[j].adapters = adapters;
        if (to[j].low.size() < size_t(T) * w.rank) to[j].low.resize(size_t(T) * w.rank);
        if (!w.N || w.kind < INT8 || to[j].q.size() >= size_t(T) * w.K && to[j].scale.size() >= size_t(T) * (w.K / w.group)) continue;
        to[j].q.resize(std::max(to[j].q.size(), size_t(T) * w.K));
        to[j].scale.resize(std::max(to[j].scale.size(), size_t(T) * (w.K / w.group)));
        to[j].sum.resize(to[j].scale.size());
    }
}

// Token t's inputs of some layers, made ready for their products
static inline void prepare(const Linear *layers, int count, const float *x, int t, Rounded *to) {
    for (int j = 0; j < count; j++) {
        if (layers[j].N && layers[j].kind >= INT8) round_row(layers[j], x, t, to[j]);
        if (layers[j].N && layers[j].rank) adapt_row(layers[j], x, t, to[j]);
    }
}

// The MLP's nonlinearity, in place over `gate`: SwiGLU (Shazeer 2020), or without values GELU in its tanh form
static void activate(float *gate, const float *value, int n) {
    for (int k = 0; k < n; k += W) {
        const Floats g = load<Floats>(gate + k);
        if (value) store(gate + k, g / (1.0f + exp(-g)) * load<Floats>(value + k));
        else store(gate + k, g / (1.0f + exp(-1.59576912f * (g + 0.044715f * g * g * g))));  // 2 sqrt(2 / pi)
    }
}

extern "C" int lanes() { return W; }

// One layer alone: x (T, inputs) -> y (T, N)
extern "C" void linear(const Linear *w, int T, const float *x, float *y, int threads) {
    Rounded rounded[1];
    make_room(w, 1, T, nullptr, rounded);
#pragma omp parallel num_threads(threads)  // torch's own threads: it works before and after this, and they are awake
    {
#pragma omp for
        for (int t = 0; t < T; t++) prepare(w, 1, x + size_t(t) * w->inputs, t, rounded);
        const int64_t count = panels_of(*w), me = omp_get_thread_num(), all = omp_get_num_threads();
        products(w, 1, x, rounded, T, y, w->N, false, count * me / all, count * (me + 1) / all);
    }
}

// ids, adapters (T,), spans (S,), blocks: their lists one after the other; rows (R,): the tokens that are wanted: their logits (R, V),
// or if there is room for them, what the head reads (R, C)
extern "C" void forward(const Model *model, int T, const int64_t *ids, const int32_t *adapters, int S, const Span *spans,
                        const int32_t *blocks, int R, const int64_t *rows, float *logits, float *hidden, int threads) {
    const Model &m = *model;
    const int C = m.C, D = m.D, width = (m.H + 2 * m.KV) * D, inner = m.H * D;
    std::vector<float> x(size_t(T) * C), normed(size_t(std::max(T, R)) * C), qkv(size_t(T) * width), attended(size_t(T) * inner),
        up(size_t(T) * 2 * m.M);
    std::vector<int> span_of(T), positions(T);
    struct Unit { int span, first, last, head; };
    std::vector<Unit> units;  // of attention: up to 16 tokens of a sequence, one key head; those with most keys first
    for (int s = 0; s < S; s++) {
        for (int i = 0; i < spans[s].n; i++) span_of[spans[s].start + i] = s, positions[spans[s].start + i] = spans[s].past + i;
        for (int last = spans[s].n; last > 0; last -= 16)
            for (int h = 0; h < m.KV; h++) units.push_back({s, std::max(0, last - 16), last, h});
    }
    Rounded rounded[3], last[1];
    for (int i = 0; i < m.L; i++) {
        make_room(m.layers[i].qkv, 3, T, adapters, rounded);
        make_room(m.layers[i].up, 2, T, adapters, rounded);
        make_room(&m.layers[i].out, 1, T, adapters, rounded);
        make_room(&m.layers[i].down, 1, T, adapters, rounded);
    }
    std::vector<int32_t> row_adapters(R);
    for (int r = 0; r < R; r++) row_adapters[r] = adapters[rows[r]];
    make_room(&m.head, 1, R, row_adapters.data(), last);

    Team &team = Team::only();
    team.run(threads, 3 + 11 * m.L, [&](int me) {
        int phase = 0;
        auto each = [&](int count, auto f) {  // of some tokens
            team.share(phase++, me, count, std::max(8, count / (4 * threads)), [&](int first, int last) { for (int t = first; t < last; t++) f(t); });
        };
        auto multiply = [&](const Linear *layers, int n, const float *from, const Rounded *codes, int rows, float *to, size_t stride, bool onto) {
            int count = 0;
            for (int j = 0; j < n; j++) count += panels_of(layers[j]);
            const int grain = 4 + (1 << 19) / (int64_t(layers->K) * W * rows + 1) / 4 * 4;  // some 10 microseconds, in whole blocks
            team.share(phase++, me, count, grain, [&](int first, int last) {
                products(layers, n, from, codes, rows, to, stride, onto, first, last);
            });
        };
        each(T, [&](int t) {
            for (int k = 0; k < C; k++)
                x[size_t(t) * C + k] = m.embed[ids[t] * C + k] + (m.places ? m.places[size_t(positions[t]) * C + k] : 0);
        });
        for (int i = 0; i < m.L; i++) {
            const Layer &layer = m.layers[i];
            each(T, [&](int t) {
                normalize(&x[size_t(t) * C], layer.norm1, C, m.eps, &normed[size_t(t) * C]);
                prepare(layer.qkv, 3, &normed[size_t(t) * C], t, rounded);
            });
            multiply(layer.qkv, 3, normed.data(), rounded, T, qkv.data(), width, false);
            each(T, [&](int t) {
                (m.cached == FLOAT16 ? remember<uint16_t> : remember<float>)(m, layer, &qkv[size_t(t) * width], positions[t],
                                                                             blocks[spans[span_of[t]].blocks + positions[t] / PAGE]);
            });
            team.share(phase++, me, units.size(), 1, [&](int u, int) {
                const Span &span = spans[units[u].span];
                attend_some(m, layer, span, units[u].first, units[u].last, units[u].head, blocks + span.blocks, qkv.data(), attended.data());
            });
            each(T, [&](int t) { prepare(&layer.out, 1, &attended[size_t(t) * inner], t, rounded); });
            multiply(&layer.out, 1, attended.data(), rounded, T, x.data(), C, true);
            each(T, [&](int t) {
                normalize(&x[size_t(t) * C], layer.norm2, C, m.eps, &normed[size_t(t) * C]);
                prepare(layer.up, 2, &normed[size_t(t) * C], t, rounded);
            });
            multiply(layer.up, 2, normed.data(), rounded, T, up.data(), 2 * m.M, false);
            each(T, [&](int t) {  // into the first M of the token's 2M
                float *gate = &up[size_t(t) * 2 * m.M];
                activate(gate, layer.up[1].N ? gate + m.M : nullptr, m.M);
                prepare(&layer.down, 1, gate, t, rounded);
            });
            if (layer.down.kind < INT8)  // a product of floats reads rows of M
                each(1, [&](int) { for (int t = 1; t < T; t++) memcpy(&up[size_t(t) * m.M], &up[size_t(t) * 2 * m.M], m.M * sizeof(float)); });
            multiply(&layer.down, 1, up.data(), rounded, T, x.data(), C, true);
        }
        each(R, [&](int r) {
            normalize(&x[rows[r] * C], m.norm, C, m.eps, &normed[size_t(r) * C]);
            prepare(&m.head, 1, &normed[size_t(r) * C], r, last);
        });
        if (!hidden) multiply(&m.head, 1, normed.data(), last, R, logits, m.head.N, false);
    });
    if (hidden) memcpy(hidden, normed.data(), size_t(R) * C * sizeof(float));
}
