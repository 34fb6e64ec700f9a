/* Decodes only the part of a JPEG file that a crop needs, with libjpeg-turbo's scanline calls, and resizes RGBX pixels
   with the arithmetic of Pillow 13. The caller owns all memory; nothing is kept between calls. */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <jpeglib.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif
enum { BITS = 22, HALF = 1 << (BITS - 1) }; /* fixed point, as in Pillow */
enum { LINES = 8, WIDE = 4 * LINES };       /* WIDE: bytes of one pixel in eight lines, sums that fit registers */

/* Output i of `out` sums count[i] inputs from first[i] on, with the weights from i * size on. crop.py has the same
   struct. */
typedef struct {
  const int32_t *first, *count;
  int32_t *weights, size, out;
} taps;

typedef struct {
  struct jpeg_error_mgr base;
  jmp_buf out;
} trap;

static void leave(j_common_ptr info) { longjmp(((trap *)info->err)->out, 1); }

static void warn(j_common_ptr info, int level) {
  if (level < 0) leave(info); /* damaged */
}

/* Writes the part (left, top, width, height) and a margin at its sides to lines of `pitch` bytes, as RGB or RGBX.
   Returns the left margin's width in pixels, or -1 if this file needs another decoder. */
int decode_part(const uint8_t *data, unsigned long size, const int *part, int rgbx, int pitch, uint8_t *lines) {
  struct jpeg_decompress_struct info = {0};
  trap errors;
  volatile int margin = -1;
  info.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = leave;
  errors.base.emit_message = warn;
  if (part[0] < 0 || part[1] < 0 || part[2] < 1 || part[3] < 1 || pitch < 1) return -1;
  if (setjmp(errors.out)) goto end;
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, data, size);
  jpeg_read_header(&info, TRUE);
  if (info.jpeg_color_space != JCS_YCbCr && info.jpeg_color_space != JCS_GRAYSCALE) goto end;
  if (info.max_h_samp_factor > 2) goto end;
  /* Sides of JPEG files are below 65,536, so that no sum overflows. */
  if (part[0] > (int)info.image_width - part[2] || part[1] > (int)info.image_height - part[3]) goto end;
  info.out_color_space = rgbx ? JCS_EXT_RGBX : JCS_RGB;
  jpeg_start_decompress(&info);
  /* 32 pixels at each side: upsampling uses the chroma beside the part. */
  JDIMENSION from = part[0] > 32 ? part[0] - 32 : 0, to = part[0] + part[2] + 32;
  JDIMENSION width = (to < info.image_width ? to : info.image_width) - from;
  jpeg_crop_scanline(&info, &from, &width); /* moves the left edge to a multiple of 8 or 16 */
  if (width * (rgbx ? 4 : 3) > (JDIMENSION)pitch) goto end;
  if (part[1]) jpeg_skip_scanlines(&info, part[1]);
  for (int i = 0; i < part[3]; i++, lines += pitch) jpeg_read_scanlines(&info, &lines, 1);
  margin = part[0] - (int)from;
end:
  jpeg_destroy_decompress(&info);
  return margin;
}

static double filter(double x, int cubic) {
  if ((x = fabs(x)) < 1) return cubic ? (1.5 * x - 2.5) * x * x + 1 : 1 - x;
  return cubic && x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* Computes the weights of sums around center[i]; `step` is the distance of neighboring inputs in the filter. */
void weigh(const taps *t, const double *center, double step, int cubic) {
  for (int i = 0; i < t->out; i++) {
    double sum = 0;
    for (int k = 0; k < t->count[i]; k++) sum += filter((t->first[i] + k - center[i] + 0.5) * step, cubic);
    for (int k = 0; k < t->count[i]; k++) {
      double weight = filter((t->first[i] + k - center[i] + 0.5) * step, cubic) / sum * (1 << BITS);
      t->weights[(size_t)i * t->size + k] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
  }
}

static inline uint8_t to_byte(int32_t sum) { return sum >> BITS < 0 ? 0 : sum >> BITS > 255 ? 255 : sum >> BITS; }

/* Computes `wide` bytes of the result, weighted sums of `count` lines. */
static inline void sum(const uint8_t *lines, int pitch, int count, const int32_t *weights, int wide, uint8_t *result) {
  int32_t sums[WIDE];
  for (int j = 0; j < wide; j++) sums[j] = HALF;
  for (int k = 0; k < count; k++, lines += pitch)
    for (int j = 0; j < wide; j++) sums[j] += lines[j] * weights[k];
  for (int j = 0; j < wide; j++) result[j] = to_byte(sums[j]);
}

/* Whether every output sums at least one of the `have` inputs, none outside them, and has room for its weights. */
static int fits(const taps *t, int have) {
  for (int i = 0; i < t->out; i++)
    if (t->count[i] < 1 || t->count[i] > t->size || t->first[i] < 0 || t->first[i] > have - t->count[i]) return 0;
  return t->out > 0;
}

static FAST void sum_lines(const uint8_t *in, int pitch, int width, const taps *t, uint8_t *result) {
  for (int i = 0; i < t->out; i++, result += width) {
    const uint8_t *lines = in + (size_t)t->first[i] * pitch;
    const int32_t *weights = t->weights + (size_t)i * t->size;
    int x = 0;
    for (; x <= width - WIDE; x += WIDE) sum(lines + x, pitch, t->count[i], weights, WIDE, result + x);
    for (; x < width; x++) sum(lines + x, pitch, t->count[i], weights, 1, result + x);
  }
}

/* Computes every line of the result as a weighted sum of some of `rows` lines of `width` bytes. Returns 0 if the taps
   need lines outside them. */
int down(const uint8_t *in, int pitch, int rows, int width, const taps *t, uint8_t *result) {
  if (pitch < width || width < 1 || !fits(t, rows)) return 0;
  sum_lines(in, pitch, width, t, result);
  return 1;
}

static FAST void turn(const uint8_t *in, int pitch, int rows, const taps *t, uint8_t *result, uint8_t *work) {
  int from = t->first[0], to = from + t->count[0];
  for (int i = 1; i < t->out; i++) {
    if (t->first[i] < from) from = t->first[i];
    if (t->first[i] + t->count[i] > to) to = t->first[i] + t->count[i];
  }
  uint32_t *column = (uint32_t *)work, *turned = column + LINES * (size_t)to;
  for (int left = rows; left > 0; left -= LINES, in += LINES * (size_t)pitch) {
    const uint32_t *lines[LINES]; /* repeats the last if there are fewer */
    for (int l = 0; l < LINES; l++) lines[l] = (const uint32_t *)(in + (size_t)(l < left ? l : left - 1) * pitch);
    for (int i = from; i < to; i++)
      for (int l = 0; l < LINES; l++) column[LINES * i + l] = lines[l][i];
    sum_lines(work, WIDE, WIDE, t, (uint8_t *)turned);
    for (int l = 0; l < LINES && l < left; l++, result += 4 * t->out)
      for (int i = 0; i < t->out; i++) ((uint32_t *)result)[i] = turned[LINES * i + l];
  }
}

/* Does the same along lines of RGBX pixels, on eight lines at a time, transposed. `work` has room for eight lines of
   `in`, each of `width` pixels, and eight of the result. */
int across(const uint8_t *in, int pitch, int rows, int width, const taps *t, uint8_t *result, uint8_t *work) {
  if (width < 1 || pitch / 4 < width || !fits(t, width)) return 0;
  turn(in, pitch, rows, t, result, work);
  return 1;
}
