/* Decodes only the part of a JPEG file that a crop needs, by libjpeg-turbo's scanline calls, and resizes RGBX pixels in
   the arithmetic of Pillow 13. All memory belongs to the caller; nothing is kept between calls. */
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
enum { LINES = 8, WIDE = 4 * LINES };       /* bytes of one pixel in eight lines; sums that registers hold */

/* Output i of `out` sums `count` inputs from `first` on with the weights from i * size on; the same in crop.py. */
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
   Returns how many pixels the left margin has, or -1 where this file is to be left to others. */
int decode_part(const uint8_t *data, unsigned long size, const int *part, int rgbx, int pitch, uint8_t *lines) {
  struct jpeg_decompress_struct info = {0};
  trap errors;
  volatile int margin = -1;
  info.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = leave;
  errors.base.emit_message = warn;
  if (setjmp(errors.out)) goto end;
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, data, size);
  jpeg_read_header(&info, TRUE);
  if (info.jpeg_color_space != JCS_YCbCr && info.jpeg_color_space != JCS_GRAYSCALE) goto end;
  if (info.max_h_samp_factor > 2) goto end;
  if (part[0] + part[2] > (int)info.image_width || part[1] + part[3] > (int)info.image_height) goto end;
  info.out_color_space = rgbx ? JCS_EXT_RGBX : JCS_RGB;
  jpeg_start_decompress(&info);
  /* 32 pixels at each side: chroma beside the part counts in upsampling. */
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

/* Writes the weights of sums around center[i]; `step` is what a distance of one input counts in the filter. */
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

/* `wide` bytes of the result: the sum of `count` lines. */
static inline void sum(const uint8_t *lines, int pitch, int count, const int32_t *weights, int wide, uint8_t *result) {
  int32_t sums[WIDE];
  for (int j = 0; j < wide; j++) sums[j] = HALF;
  for (int k = 0; k < count; k++, lines += pitch)
    for (int j = 0; j < wide; j++) sums[j] += lines[j] * weights[k];
  for (int j = 0; j < wide; j++) result[j] = to_byte(sums[j]);
}

/* Every line of the result is a sum of lines of `width` bytes. */
FAST void down(const uint8_t *in, int pitch, int width, const taps *t, uint8_t *result) {
  for (int i = 0; i < t->out; i++, result += width) {
    const uint8_t *lines = in + (size_t)t->first[i] * pitch;
    const int32_t *weights = t->weights + (size_t)i * t->size;
    int x = 0;
    for (; x <= width - WIDE; x += WIDE) sum(lines + x, pitch, t->count[i], weights, WIDE, result + x);
    for (; x < width; x++) sum(lines + x, pitch, t->count[i], weights, 1, result + x);
  }
}

/* The same for the RGBX pixels of lines: eight lines, turned by a right angle, are work for `down`. `work` has room for
   eight times the pixels of a line of `in` and of the result. */
FAST void across(const uint8_t *in, int pitch, int rows, const taps *t, uint8_t *result, uint8_t *work) {
  const int from = t->first[0], to = t->first[t->out - 1] + t->count[t->out - 1];
  uint32_t *column = (uint32_t *)work, *turned = column + LINES * (size_t)to;
  for (int left = rows; left > 0; left -= LINES, in += LINES * (size_t)pitch) {
    const uint32_t *lines[LINES]; /* of fewer the last again */
    for (int l = 0; l < LINES; l++) lines[l] = (const uint32_t *)(in + (size_t)(l < left ? l : left - 1) * pitch);
    for (int i = from; i < to; i++)
      for (int l = 0; l < LINES; l++) column[LINES * i + l] = lines[l][i];
    down(work, WIDE, WIDE, t, (uint8_t *)turned);
    for (int l = 0; l < LINES && l < left; l++, result += 4 * t->out)
      for (int i = 0; i < t->out; i++) ((uint32_t *)result)[i] = turned[LINES * i + l];
  }
}
