#include "random_case.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>

namespace fastsep_tests {
namespace {

using namespace fastsep;

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}

  int64_t from(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_); }
  bool chance(int percent) { return from(1, 100) <= percent; }
  // Each order of magnitude as often as the others.
  int64_t spread(int64_t low, int64_t high) {
    const double a = std::log(static_cast<double>(low)), b = std::log(static_cast<double>(high) + 1);
    const double value = std::exp(a + (b - a) * static_cast<double>(from(0, 1 << 30)) / (1 << 30));
    return std::clamp(static_cast<int64_t>(value), low, high);
  }
  Activation activation() { return static_cast<Activation>(from(0, activation_count - 1)); }

 private:
  std::mt19937_64 random_;
};

int64_t side(Draw& draw) { return draw.chance(50) ? draw.from(1, 80) : draw.from(1, 24); }

int64_t channels(Draw& draw, int64_t most) {
  const int64_t some = draw.spread(1, most);
  return draw.chance(30) ? std::min(most, (some + 7) / 8 * 8) : some;
}

int64_t kernel_side(Draw& draw) { return draw.chance(60) ? 3 + 2 * draw.from(0, 2) : draw.from(1, 7); }

int64_t stride(Draw& draw) { return draw.chance(60) ? 1 : draw.chance(70) ? 2 : draw.from(1, 5); }

int64_t dilation(Draw& draw) { return draw.chance(75) ? 1 : draw.from(1, 5); }

// A kernel's window along both axes, and the paddings.
void draw_window(Draw& draw, Problem& p) {
  p.kernel_h = kernel_side(draw);
  p.kernel_w = draw.chance(70) ? p.kernel_h : kernel_side(draw);
  p.stride_h = stride(draw);
  p.stride_w = draw.chance(70) ? p.stride_h : stride(draw);
  p.dilation_h = dilation(draw);
  p.dilation_w = draw.chance(70) ? p.dilation_h : dilation(draw);
  const int64_t reach_h = (p.kernel_h - 1) * p.dilation_h, reach_w = (p.kernel_w - 1) * p.dilation_w;
  if (draw.chance(50)) {
    p.pad_top = p.pad_bottom = reach_h / 2;
    p.pad_left = p.pad_right = reach_w / 2;
  } else if (draw.chance(70)) {
    for (int64_t* pad : {&p.pad_top, &p.pad_bottom}) *pad = draw.from(0, reach_h + draw.from(0, 2));
    for (int64_t* pad : {&p.pad_left, &p.pad_right}) *pad = draw.from(0, reach_w + draw.from(0, 2));
  }
}

void draw_expansion(Draw& draw, Problem& p) {
  Expansion& e = p.expand;
  e.activation = draw.activation();
  if (draw.chance(65)) {
    e = {channels(draw, 200), e.activation, p.height, p.width, 1, 1, 1, 1, 0, 0, false};
    if (draw.chance(50)) p.out_channels = e.channels;
    return;
  }
  e.channels = draw.chance(60) ? 3 : draw.from(1, 20);
  e.kernel_h = draw.from(1, 5);
  e.kernel_w = draw.chance(70) ? e.kernel_h : draw.from(1, 5);
  e.stride_h = draw.from(1, 3);
  e.stride_w = draw.chance(50) ? 2 : draw.from(1, 3);
  e.pad_top = draw.from(0, 4);
  e.pad_left = draw.from(0, 4);
  e.height = std::max<int64_t>(1, p.height * e.stride_h + draw.from(-4, 4));
  e.width = std::max<int64_t>(1, p.width * e.stride_w + draw.from(-4, 4));
  e.planar = e.channels == 3 && e.stride_w == 2 && draw.chance(60);
}

int64_t input_elements(const Problem& p) {
  const Expansion& e = p.expand;
  return p.batch * (e.channels > 0 ? e.channels * e.height * e.width : 0) + p.batch * p.channels * p.height * p.width;
}

int64_t output_elements(const Problem& p) {
  return p.batch * std::max(p.out_channels, p.channels * p.multiplier) * out_height(p) * out_width(p);
}

// Halves what is largest until the problem is small enough.
void shrink(Draw& draw, Problem& p, double most_products) {
  while (products_of(p) > most_products || input_elements(p) > (1 << 22) || output_elements(p) > (1 << 22)) {
    const bool keeps_planes = draw.chance(50);
    if (p.batch > 1)
      --p.batch;
    else if (p.out_channels > 8 && p.expand.channels != p.out_channels)
      p.out_channels = std::max<int64_t>(1, p.out_channels / 3);
    else if (p.channels > 2 && (keeps_planes || p.height * p.width < 16))
      p.channels = (2 * p.channels + 2) / 3;
    else if (p.out_channels > 1 && p.expand.channels == p.out_channels)
      p.expand.channels = p.out_channels = std::max<int64_t>(1, p.out_channels / 2);
    else if (p.height * p.width > 1 && p.expand.channels == 0)
      (p.height > p.width ? p.height : p.width) -= 1;
    else if (p.expand.channels > 3)
      p.expand.channels /= 2;
    else
      p.channels = std::max<int64_t>(1, p.channels / 2);
  }
}

Problem draw_problem(Draw& draw, double most_products) {
  Problem p = {};
  p.dtype = draw.chance(75) ? Dtype::f32 : Dtype::f64;
  p.layout = draw.chance(65) ? Layout::nhwc : Layout::nchw;
  p.batch = draw.chance(50) ? 1 : draw.from(1, 5);
  p.channels = channels(draw, 1200);
  p.height = side(draw);
  p.width = draw.chance(40) ? p.height : side(draw);
  p.out_channels = draw.chance(15) ? 0 : draw.chance(30) ? p.channels : channels(draw, 700);
  p.multiplier = draw.chance(80) ? 1 : draw.from(2, 4);
  if (draw.chance(30)) {
    // Narrow planes in many tiles: those of few columns and rows fill the product's groups of pixels worst.
    p.width = draw.from(1, 20);
    p.channels = draw.from(100, 1200);
    p.out_channels = std::min<int64_t>(p.out_channels, draw.from(1, 24));
  }
  draw_window(draw, p);
  p.mid_activation = draw.activation();
  p.activation = p.out_channels > 0 ? draw.activation() : Activation::identity;
  p.expand = {0, Activation::identity, p.height, p.width, 1, 1, 1, 1, 0, 0, false};
  if (p.layout == Layout::nhwc && p.out_channels > 0 && draw.chance(10)) {
    p.gate = true;
    p.kernel_h = p.kernel_w = 1;
  } else if (p.layout == Layout::nhwc && draw.chance(30)) {
    draw_expansion(draw, p);
  }
  if (p.gate || p.expand.channels > 0) p.multiplier = 1;
  p.residual = p.layout == Layout::nhwc && p.out_channels > 0 && draw.chance(25);
  if (p.out_channels == 0) p.activation = Activation::identity;
  if (out_height(p) > 0 && out_width(p) > 0) shrink(draw, p, most_products);
  return p;
}

}  // namespace

double products_of(const Problem& p) {
  const auto pixels = static_cast<double>(p.batch * out_height(p) * out_width(p));
  const auto plane = static_cast<double>(p.batch * p.height * p.width);
  const auto depth = static_cast<double>(p.channels * p.multiplier);
  return pixels * depth * static_cast<double>(p.kernel_h * p.kernel_w + p.out_channels) +
         plane * static_cast<double>(p.channels * p.expand.channels * p.expand.kernel_h * p.expand.kernel_w);
}

Case random_case(uint64_t seed, double most_products) {
  Draw draw(seed);
  Case c = {};
  do {
    c.problem = draw_problem(draw, most_products);
  } while (validate(c.problem) != Status::ok);
  c.depthwise_bias = draw.chance(50);
  c.bias = draw.chance(50);
  c.line = line_of(c);
  return c;
}

Case random_sizes(uint64_t seed) {
  Draw draw(seed);
  Case c = {};
  Problem& p = c.problem;
  p = draw_problem(draw, 1e300);
  // Some of the sizes, as large as can be.
  Expansion& e = p.expand;
  for (int64_t* size :
       {&p.batch,    &p.channels,  &p.height,   &p.width,      &p.out_channels, &p.multiplier, &p.kernel_h,
        &p.kernel_w, &p.stride_h,  &p.stride_w, &p.dilation_h, &p.dilation_w,   &p.pad_top,    &p.pad_bottom,
        &p.pad_left, &p.pad_right, &e.channels, &e.height,     &e.width,        &e.kernel_h,   &e.kernel_w,
        &e.stride_h, &e.stride_w,  &e.pad_top,  &e.pad_left})
    if (*size > 0 && draw.chance(15)) *size = draw.spread(1, int64_t{1} << draw.from(1, 62));
  c.line = line_of(c);
  return c;
}

std::string line_of(const Case& c) {
  const Problem& p = c.problem;
  const Expansion& e = p.expand;
  std::ostringstream line;
  const auto put = [&](const char* key, int64_t value, int64_t otherwise) {
    if (value != otherwise) line << ' ' << key << '=' << value;
  };
  line << "name=found";
  put("n", p.batch, 1);
  put("e", e.channels, 0);
  put("c", p.channels, -1);
  put("h", p.height, -1);
  put("w", p.width, -1);
  put("k", p.out_channels, -1);
  put("m", p.multiplier, 1);
  put("kh", p.kernel_h, -1);
  put("kw", p.kernel_w, -1);
  put("sh", p.stride_h, 1);
  put("sw", p.stride_w, 1);
  put("dh", p.dilation_h, 1);
  put("dw", p.dilation_w, 1);
  put("pt", p.pad_top, 0);
  put("pb", p.pad_bottom, 0);
  put("pl", p.pad_left, 0);
  put("pr", p.pad_right, 0);
  put("db", c.depthwise_bias, 0);
  put("b", c.bias, 0);
  if (e.channels > 0) {
    line << " ea=" << activation_name(e.activation);
    put("eh", e.height, p.height);
    put("ew", e.width, p.width);
    put("ekh", e.kernel_h, 1);
    put("ekw", e.kernel_w, 1);
    put("esh", e.stride_h, 1);
    put("esw", e.stride_w, 1);
    put("ept", e.pad_top, 0);
    put("epl", e.pad_left, 0);
    put("planar", e.planar, 0);
  }
  if (p.mid_activation != Activation::identity) line << " mid=" << activation_name(p.mid_activation);
  if (p.activation != Activation::identity) line << " act=" << activation_name(p.activation);
  put("res", p.residual, 0);
  put("gate", p.gate, 0);
  return line.str();
}

}  // namespace fastsep_tests
