// Work shared out over threads, and over chunks that depend on the shapes only, so that sums do not depend on threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

// of the OpenMP runtime that PyTorch has loaded, whichever it is: found when this library is loaded, so that there is
// one pool of threads, and no second one to compete with it
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

namespace {

// work(i) for i in 0..count-1, on `threads` threads
template <class Work>
void parallel(int threads, int64_t count, Work&& work) {
    struct Share {
        Work& work;
        int64_t count;
    } share{work, count};
    auto run = [](void* data) {
        auto& own = *static_cast<Share*>(data);
        int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t i = thread * own.count / all; i < (thread + 1) * own.count / all; i++) own.work(i);
    };
    if (threads > 1 && count > 1) {
        GOMP_parallel(run, &share, unsigned(std::min<int64_t>(threads, count)), 0);
    } else {
        for (int64_t i = 0; i < count; i++) work(i);
    }
}

// chunks that images are summed in: none has less than 256 rows of them if it need not
inline int64_t chunks_of(int64_t images, int64_t rows) {
    int64_t least = std::max<int64_t>(1, (256 + rows - 1) / std::max<int64_t>(rows, 1));
    return std::max<int64_t>(1, std::min<int64_t>(256, images / least));
}

// memory that begins with a cache line
struct Freed {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Freed>;

template <class T>
Buffer<T> buffer(int64_t size) {
    return Buffer<T>(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{64})));  // uninitialized
}

template <class T>
Buffer<T> zeros(int64_t size) {
    auto made = buffer<T>(size);
    std::memset(made.get(), 0, size * sizeof(T));
    return made;
}

}  // namespace
