/* Decodes only the part of a JPEG file that a crop needs, by libjpeg-turbo's scanline calls, and resizes RGBX pixels to
   the bytes that Pillow 13 gives. All memory belongs to the caller; nothing is kept between calls. */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <jpeglib.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif
enum { BITS = 22, HALF = 1 << (BITS - 1) }; /* fixed point, as in Pillow */
typedef int32_t quad __attribute__((vector_size(16)));                     /* sums of a pixel */
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

FAST static void across(const uint8_t *in, int pitch, int lines, uint8_t *result, const taps *t, int out, quad *work) {
  int32_t *line = (int32_t *)(work + out);
  const int from = 4 * t->first[0], to = 4 * (t->first[out - 1] + t->count[out - 1]), size = t->size;
  for (; lines--; in += pitch, result += 4 * out) {
    for (int i = from; i < to; i++) line[i] = in[i];
    for (int i = 0; i < out; i++) {
      quad sum = {HALF, HALF, HALF, HALF}, *pixels = (quad *)line + t->first[i];
      for (int k = 0; k < size; k++) sum += pixels[k] * t->weights[i * size + k]; /* behind the last tap come zeros */
      work[i] = sum;
    }
    for (int i = 0; i < 4 * out; i++) result[i] = to_byte(((int32_t *)work)[i]);
  }
}

FAST static void down(const uint8_t *in, int pitch, int width, uint8_t *result, const taps *t, int out, int32_t *sums) {
  for (int i = 0; i < out; i++, result += width) {
    for (int x = 0; x < width; x++) sums[x] = HALF;
    for (int k = 0; k < t->count[i]; k++) {
      const uint8_t *line = in + (size_t)(t->first[i] + k) * pitch;
      const int32_t weight = t->weights[i * t->size + k];
      for (int x = 0; x < width; x++) sums[x] += line[x] * weight;
    }
    for (int x = 0; x < width; x++) result[x] = to_byte(sums[x]);
  }
}

/* Resizes `box` (left, top, right, bottom) of an image of whole[0] x whole[1] to uint8[out][out][3]. `in` is its part
   (left, top, width, height) as RGBX; `down_first` is the order of the passes; the caller knows the size of `work`. */
void resize_rgbx(const uint8_t *in, int pitch, const int *whole, const int *part, const double *box, int out, int cubic,
                 int down_first, uint8_t *result, uint8_t *work) {
  taps x, y;
  int32_t *next = make_taps(&x, (int32_t *)work, whole[0], part[0], box[0], box[2], out, cubic);
  next = make_taps(&y, next, whole[1], part[1], box[1], box[3], out, cubic);
  quad *sums = (quad *)(((uintptr_t)next + 31) / 32 * 32);
  uint8_t *half = (uint8_t *)(sums + out + part[2] + x.size);
  uint8_t *full = half + 4 * (size_t)out * (down_first ? part[2] : part[3]);
  if (down_first) {
    down(in, pitch, 4 * part[2], half, &y, out, (int32_t *)sums);
    across(half, 4 * part[2], out, full, &x, out, sums);
  } else {
    across(in, pitch, part[3], half, &x, out, sums);
    down(half, 4 * out, 4 * out, full, &y, out, (int32_t *)sums);
  }
  for (int i = 0; i < out * out; i++)
    for (int c = 0; c < 3; c++) result[3 * i + c] = full[4 * i + c];
}
