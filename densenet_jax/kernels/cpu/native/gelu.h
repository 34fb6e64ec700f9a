// The exact GELU, z * Phi(z) with Phi the normal distribution, and its derivative, for vectors of float32.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_GELU_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_GELU_H_

#include <cstdint>

#include "tiles.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace densenet_jax {

using Floats = Lanes<float>::Vector;
constexpr int kFloats = Lanes<float>::kCount;

inline Floats Load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void Store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }

inline Floats Reciprocal(Floats x) {
#if defined(__AVX512F__)  // 14 bits and one step of Newton: half the time of a division
  const Floats r = (Floats)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

inline Floats Clamp(Floats x, float low, float high) {
  x = x < low ? low - Floats{} : x;
  return x > high ? high - Floats{} : x;
}

// Returns 2 * Phi(z) - 1 = erf(z / sqrt(2)) as z * P(z^2) / Q(z^2), fitted on [-5.4, 5.4] to 1.1e-8 by weighted least
// squares; beyond, it is +-1 in float32. Rounding makes it 3.5e-7.
inline Floats Erf(Floats z) {
  z = Clamp(z, -5.4f, 5.4f);
  const Floats u = z * z;
  const Floats p = ((((4.67764671e-08f * u + 1.27197527e-05f) * u + 3.28602968e-04f) * u + 9.30145662e-03f) * u +
                    6.67404905e-02f) * u + 7.97884464e-01f;
  const Floats q = ((((1.21662436e-06f * u + 7.23936828e-05f) * u + 1.85886724e-03f) * u + 2.83775497e-02f) * u +
                    2.50312895e-01f) * u + 1.0f;
  return z * p * Reciprocal(q);
}

inline Floats Gelu(Floats z) {
  const Floats half = 0.5f * z;
  return half + half * Erf(z);
}

// Returns exp(x) for x <= 0: 2^n by the exponent's bits times the Taylor series of 2^f, |f| <= 1/2.
inline Floats ExpOfNegative(Floats x) {
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  x = Clamp(x, -87.0f, 0.0f);
  const Floats y = x * 1.44269504f;
  const Integers n = __builtin_convertvector(y - 0.5f, Integers);  // rounds towards zero
  const Floats f = (y - __builtin_convertvector(n, Floats)) * 0.693147181f;
  const Floats power = (((((1.38888889e-03f * f + 8.33333333e-03f) * f + 4.16666667e-02f) * f + 1.66666667e-01f) * f +
                         0.5f) * f + 1.0f) * f + 1.0f;
  return power * (Floats)((n + 127) << 23);
}

// Sets value to Gelu(z) and returns its derivative, Phi(z) + z * exp(-z^2 / 2) / sqrt(2 * pi).
inline Floats GeluDerivative(Floats z, Floats* value) {
  const Floats phi = 0.5f + 0.5f * Erf(z);
  *value = z * phi;
  return phi + z * (0.398942280f * ExpOfNegative(-0.5f * (z * z)));
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_GELU_H_
