/* Decodes only the part of a JPEG file that a crop needs, by libjpeg-turbo's scanline calls, and resizes RGBX pixels to
   the bytes that Pillow 13 gives. All memory belongs to the caller; nothing is kept between calls. */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <jpeglib.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif
enum { BITS = 22, HALF = 1 << (BITS - 1) };        /* fixed point, as in Pillow */
enum { WIDE = 16 };                                /* bytes of one pixel in four lines; sums that registers hold */
typedef struct { int size, *first, *count; int32_t *weights; } taps;       /* which inputs an output sums */
typedef struct { struct jpeg_error_mgr base; jmp_buf out; } trap;          /* errors end the call */

static void leave(j_common_ptr info) { longjmp(((trap *)info->err)->out, 1); }
static void warn(j_common_ptr info, int level) { if (level < 0) leave(info); } /* damaged */

/* Writes the part (left, top, width, height) and a margin at its sides to lines of `pitch` bytes, as RGB or RGBX.
   Returns how many pixels the left margin has, or -1 where this file is to be left to others. */
int decode_part(const uint8_t *data, unsigned long size, const int *part, int rgbx, int pitch, uint8_t *lines) {
  struct jpeg_decompress_struct info = {0};
  trap errors;
  volatile int margin = -1;
  info.err = jpeg_std_error(&errors.base), errors.base.error_exit = leave, errors.base.emit_message = warn;
  if (setjmp(errors.out)) goto end;
  jpeg_create_decompress(&info), jpeg_mem_src(&info, data, size), jpeg_read_header(&info, TRUE);
  if ((info.jpeg_color_space != JCS_YCbCr && info.jpeg_color_space != JCS_GRAYSCALE) || info.max_h_samp_factor > 2 ||
      part[0] + part[2] > (int)info.image_width || part[1] + part[3] > (int)info.image_height) goto end;
  info.out_color_space = rgbx ? JCS_EXT_RGBX : JCS_RGB, jpeg_start_decompress(&info);
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

/* `out` outputs lie evenly between low and high among `in` inputs, of which we have those from `have` on. Returns the
   memory behind what it used. */
static int32_t *make_taps(taps *t, int32_t *memory, int in, int have, double low, double high, int out, int cubic) {
  double scale = (high - low) / out, step = 1 / (scale > 1 ? scale : 1), reach = (cubic ? 2 : 1) / step;
  t->size = (int)(2 * reach) + 1, t->first = memory, t->count = memory + out, t->weights = memory + 2 * out;
  for (int i = 0; i < out; i++) {
    double centre = low + (i + 0.5) * scale, sum = 0;
    int from = (int)(centre - reach + 0.5), to = (int)(centre + reach + 0.5);
    from = from < 0 ? 0 : from, t->first[i] = from - have, t->count[i] = (to > in ? in : to) - from;
    for (int k = 0; k < t->count[i]; k++) sum += filter((from + k - centre + 0.5) * step, cubic);
    for (int k = 0; k < t->size; k++) {
      double weight = k < t->count[i] ? filter((from + k - centre + 0.5) * step, cubic) / sum * (1 << BITS) : 0;
      t->weights[i * t->size + k] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
  }
  return t->weights + (size_t)out * t->size;
}

static inline uint8_t to_byte(int32_t sum) { return sum >> BITS < 0 ? 0 : sum >> BITS > 255 ? 255 : sum >> BITS; }

/* Every line of the result is a sum of lines of `width` bytes. */
FAST static void down(const uint8_t *in, int pitch, int width, uint8_t *result, const taps *t, int out) {
  for (int i = 0; i < out; i++, result += width) {
    const uint8_t *lines = in + (size_t)t->first[i] * pitch;
    const int32_t *weights = t->weights + i * t->size;
    int x = 0;
    for (; x <= width - WIDE; x += WIDE) {
      int32_t sums[WIDE];
      for (int j = 0; j < WIDE; j++) sums[j] = HALF;
      for (int k = 0; k < t->count[i]; k++)
        for (int j = 0; j < WIDE; j++) sums[j] += lines[(size_t)k * pitch + x + j] * weights[k];
      for (int j = 0; j < WIDE; j++) result[x + j] = to_byte(sums[j]);
    }
    for (; x < width; x++) {
      int32_t sum = HALF;
      for (int k = 0; k < t->count[i]; k++) sum += lines[(size_t)k * pitch + x] * weights[k];
      result[x] = to_byte(sum);
    }
  }
}

/* The same for the pixels of lines: four lines, turned by a right angle, are work for `down`. */
FAST static void across(const uint8_t *in, int pitch, int rows, uint8_t *result, const taps *t, int out,
                        uint8_t *work) {
  const int from = t->first[0], to = t->first[out - 1] + t->count[out - 1];
  uint32_t *four = (uint32_t *)work, *turned = four + 4 * (size_t)to;
  for (int left = rows; left > 0; left -= 4, in += 4 * (size_t)pitch) {
    const uint32_t *lines[4]; /* of fewer than four the last again */
    for (int l = 0; l < 4; l++) lines[l] = (const uint32_t *)(in + (size_t)(l < left ? l : left - 1) * pitch);
    for (int i = from; i < to; i++)
      for (int l = 0; l < 4; l++) four[4 * i + l] = lines[l][i];
    down(work, WIDE, WIDE, (uint8_t *)turned, t, out);
    for (int l = 0; l < 4 && l < left; l++, result += 4 * out)
      for (int i = 0; i < out; i++) ((uint32_t *)result)[i] = turned[4 * i + l];
  }
}

FAST static void pack(const uint8_t *rgbx, int pixels, uint8_t *rgb) {
  for (int i = 0; i < pixels; i++)
    for (int c = 0; c < 3; c++) rgb[3 * i + c] = rgbx[4 * i + c];
}

/* Resizes `box` (left, top, right, bottom) of an image of whole[0] x whole[1] to uint8[out][out][3]. `in` is its part
   (left, top, width, height) as RGBX; `down_first` is the order of the passes; the caller knows the size of `work`. */
void resize_rgbx(const uint8_t *in, int pitch, const int *whole, const int *part, const double *box, int out, int cubic,
                 int down_first, uint8_t *result, uint8_t *work) {
  taps x, y;
  int32_t *next = make_taps(&x, (int32_t *)work, whole[0], part[0], box[0], box[2], out, cubic);
  uint8_t *turned = (uint8_t *)make_taps(&y, next, whole[1], part[1], box[1], box[3], out, cubic);
  uint8_t *half = turned + WIDE * ((size_t)part[2] + out);
  uint8_t *full = half + 4 * (size_t)out * (down_first ? part[2] : part[3]);
  if (down_first) {
    down(in, pitch, 4 * part[2], half, &y, out);
    across(half, 4 * part[2], out, full, &x, out, turned);
  } else {
    across(in, pitch, part[3], half, &x, out, turned);
    down(half, 4 * out, 4 * out, full, &y, out);
  }
  pack(full, out * out, result);
}
