// Philox4x32-10, as common/src/compress/philox.rs has it.
#pragma once

#include "device.cuh"

namespace arc {

struct alignas(16) Words {
    uint32_t of[4];
};

// Block number `block` of the stream of a tensor and step.
ARC_DEVICE Words philox(uint32_t block, uint32_t tensor, uint64_t step, uint64_t seed) {
    uint32_t c0 = block, c1 = tensor, c2 = static_cast<uint32_t>(step), c3 = static_cast<uint32_t>(step >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

} // namespace arc
