// Classifies one picture with a model that `--mode export --format onnx` wrote, preprocessing inside.
//
//     classify MODEL.onnx PICTURE.ppm [COUNT]
//
// PICTURE is a binary PPM (P6) or, for a model of one channel, PGM (P5) of 8 bits, of the size that the model takes.
// Prints the COUNT (5) most probable classes, best first: number, probability and name, separated by tabs.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Picture {
  int64_t width, height, channels;
  std::vector<uint8_t> pixels;  // rows from top to bottom, channels together
};

// A number of a PPM's header; "#" begins a comment that lasts until the end of its line.
int64_t read_number(std::istream& in) {
  int c = in.get();
  while (std::isspace(c) || c == '#') {
    if (c == '#') {
      while (c != '\n' && c != EOF) c = in.get();
    }
    c = in.get();
  }
  int64_t number = 0;
  int digits = 0;
  for (; std::isdigit(c); c = in.get()) {
    number = 10 * number + (c - '0');
    if (++digits > 6) throw std::runtime_error("the picture's header holds too large a number");
  }
  // What ends a number is one blank, which get() has taken: after the last one the pixels begin.
  if (digits == 0 || !std::isspace(c)) throw std::runtime_error("the picture's header is damaged");
  return number;
}

Picture read_picture(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("can't open " + path);
  char magic[2] = {};
  in.read(magic, 2);
  if (magic[0] != 'P' || (magic[1] != '5' && magic[1] != '6')) {
    throw std::runtime_error(path + " is no binary PPM or PGM");
  }
  Picture picture;
  picture.channels = magic[1] == '6' ? 3 : 1;
  picture.width = read_number(in);
  picture.height = read_number(in);
  if (read_number(in) != 255) throw std::runtime_error(path + " does not have 8 bits a value");
  if (picture.width < 1 || picture.height < 1 || picture.width > 16384 || picture.height > 16384) {
    throw std::runtime_error(path + " has no usable size");
  }
  picture.pixels.resize(static_cast<size_t>(picture.width * picture.height * picture.channels));
  in.read(reinterpret_cast<char*>(picture.pixels.data()), static_cast<std::streamsize>(picture.pixels.size()));
  if (in.gcount() != static_cast<std::streamsize>(picture.pixels.size())) {
    throw std::runtime_error(path + " ends too early");
  }
  return picture;
}

// A line a class, from the metadata that the exporter writes.
std::vector<std::string> class_names(const Ort::Session& session) {
  Ort::AllocatorWithDefaultOptions allocator;
  auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated("class_names", allocator);
  std::vector<std::string> names;
  std::istringstream lines(text ? text.get() : "");
  for (std::string line; std::getline(lines, line);) names.push_back(line);
  return names;
}

void check_fits(const Ort::Session& session, const Picture& picture) {
  auto type = session.GetInputTypeInfo(0);  // what the next line gives is part of it
  auto info = type.GetTensorTypeAndShapeInfo();
  auto shape = info.GetShape();
  if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 || shape.size() != 4) {
    throw std::runtime_error("the model does not take bytes; export it with its preprocessing inside");
  }
  if (shape[0] > 1) throw std::runtime_error("the model takes several pictures at once; export it for any number");
  if (shape[1] != picture.height || shape[2] != picture.width || shape[3] != picture.channels) {
    std::ostringstream message;
    message << "the picture has " << picture.width << "x" << picture.height << " pixels and " << picture.channels
            << " channels, but the model takes " << shape[2] << "x" << shape[1] << " and " << shape[3];
    throw std::runtime_error(message.str());
  }
}

std::vector<float> probabilities(Ort::Session& session, Picture& picture) {
  Ort::AllocatorWithDefaultOptions allocator;
  auto input_name = session.GetInputNameAllocated(0, allocator);
  auto output_name = session.GetOutputNameAllocated(0, allocator);
  const char* input_names[] = {input_name.get()};
  const char* output_names[] = {output_name.get()};
  const int64_t shape[] = {1, picture.height, picture.width, picture.channels};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto input = Ort::Value::CreateTensor<uint8_t>(memory, picture.pixels.data(), picture.pixels.size(), shape, 4);
  auto outputs = session.Run(Ort::RunOptions{nullptr}, input_names, &input, 1, output_names, 1);
  const float* begin = outputs[0].GetTensorData<float>();
  return {begin, begin + outputs[0].GetTensorTypeAndShapeInfo().GetElementCount()};
}

void print_best(const std::vector<float>& found, const std::vector<std::string>& names, size_t count) {
  std::vector<size_t> order(found.size());
  std::iota(order.begin(), order.end(), size_t{0});
  count = std::min(count, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    [&](size_t a, size_t b) { return found[a] > found[b]; });
  for (size_t i = 0; i < count; ++i) {
    const size_t id = order[i];
    std::printf("%zu\t%.6f\t%s\n", id, static_cast<double>(found[id]), id < names.size() ? names[id].c_str() : "");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc == 4 ? std::atoi(argv[3]) : 5;
  if (argc < 3 || argc > 4 || count < 1) {
    std::fprintf(stderr, "usage: %s MODEL.onnx PICTURE.ppm [COUNT]\n", argv[0]);
    return 2;
  }
  try {
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "classify");
    Ort::Session session(environment, argv[1], Ort::SessionOptions{});
    Picture picture = read_picture(argv[2]);
    check_fits(session, picture);
    print_best(probabilities(session, picture), class_names(session), static_cast<size_t>(count));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
