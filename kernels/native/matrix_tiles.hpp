// Matrix products of bfloat16 by tiles: 16 x 32 values times 32 x 16, summed in float32 in 16 x 16. In registers of their
// own on processors with AMX, elsewhere as plain loops that give the same sums, so that every machine can test them.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int ROWS_OF_TILE = 16, DEPTH_OF_TILE = 32, VALUES_OF_TILE = ROWS_OF_TILE * DEPTH_OF_TILE;

#ifdef HAVE_AMX

// the kernel gives a process the tiles' registers when it asks for them
inline bool tiles_permitted() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return permitted;
}

// eight tiles of 16 rows of 64 bytes for this thread, while it lives
struct Tiles {
    Tiles() {
        struct {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } configuration;
        asm volatile("ldtilecfg %0" ::"m"(configuration));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;

    template <int TILE>
    void load(const void* from) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(64l), "i"(TILE) : "memory");
    }
    template <int TILE>
    void store(void* to) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(64l), "i"(TILE) : "memory");
    }
    template <int SUM, int A, int B>
    void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
    }
};

#else

inline bool tiles_permitted() { return false; }

struct Tiles {
    uint16_t operands[8][VALUES_OF_TILE];
    float sums[8][ROWS_OF_TILE][ROWS_OF_TILE];

    template <int TILE>
    void load(const void* from) {
        std::memcpy(operands[TILE], from, sizeof operands[TILE]);
        std::memcpy(sums[TILE], from, sizeof sums[TILE]);
    }
    template <int TILE>
    void store(void* to) {
        std::memcpy(to, sums[TILE], sizeof sums[TILE]);
    }
    template <int SUM, int A, int B>
    void multiply() {
        for (int row = 0; row < ROWS_OF_TILE; row++) {
            for (int k = 0; k < DEPTH_OF_TILE; k++) {
                float a = value(operands[A][row * DEPTH_OF_TILE + k]);
                const uint16_t* b = operands[B] + k / 2 * DEPTH_OF_TILE + k % 2;
                for (int column = 0; column < ROWS_OF_TILE; column++) sums[SUM][row][column] += a * value(b[2 * column]);
            }
        }
    }
    static float value(uint16_t bits) {
        uint32_t word = uint32_t(bits) << 16;
        float v;
        std::memcpy(&v, &word, sizeof v);
        return v;
    }
};

#endif

}  // namespace
