#include "comm/verdict_text.h"

#include <array>

#include "comm/collectives.h"
#include "kernels/dtype.h"

namespace perseid::comm {
namespace {

struct RefusalText {
  Code code;
  const char* argument;
  const char* value;
  const char* limit;
};

// {a} and {b} stand for the values of the verdict.
constexpr std::array<RefusalText, 21> kRefusals{{
    {Code::kSendRows, "send_rows[{b}]", "{a}", "is outside [0, 2^31); pass the rows for rank {b}"},
    {Code::kRecvRows, "recv_rows[{b}]", "{a}", "is outside [0, 2^31); pass the rows from rank {b}"},
    {Code::kPlanSize, "plan", "{a} entries",
     "does not fit a group of {b}; pass one entry of send_rows and recv_rows for each rank"},
    {Code::kOwnRows, "send_rows", "{a}",
     "for itself differs from recv_rows={b}; make both from one plan"},
    {Code::kWidth, "width", "{a}",
     "makes rows of {b} bytes; choose width >= 0 and rows below 2^31 bytes"},
    {Code::kDType, "dtype", "{a}", "is not the number of a dtype; choose one of kernels::DType"},
    {Code::kSendBuffer, "send", "null", "but there are {a} rows to send; pass a buffer"},
    {Code::kRecvBuffer, "recv", "null", "but there are {a} rows to receive; pass a buffer"},
    {Code::kOverlap, "recv", "{a} bytes", "overlaps {b} bytes that are sent; use two buffers"},
    {Code::kDevice, "stream", "cuda",
     "needs a GPU, and that process sees none; pass host memory, or look at nvidia-smi and "
     "CUDA_VISIBLE_DEVICES"},
    {Code::kCountsSize, "send", "{a} entries",
     "differs from size * counts_per_peer={b}; pass counts_per_peer entries for each rank"},
    {Code::kCountsPerPeer, "counts_per_peer", "{a}", "is outside [0, 2^31); pass a valid number"},
    {Code::kCountValue, "send[{b}]", "{a}", "is outside [0, 2^31); pass a valid count"},
    {Code::kCount, "count", "{a}", "is outside [0, 2^31); use several calls for more elements"},
    {Code::kBuffer, "data", "null", "but there are {a} bytes to move; pass a buffer"},
    {Code::kBytes, "bytes", "{a}", "is outside [0, 2^31); use several calls for more bytes"},
    {Code::kRoot, "root", "{a}", "is not a rank of a group of {b}; choose root in [0, {b})"},
    {Code::kColor, "color", "{a}", "is negative; choose color >= 0"},
    {Code::kLayer, "layer", "{a}", "is outside [-1, 65534]; choose a layer in it"},
    {Code::kCaller, "arguments", "refused", "before the exchange; the error of that rank says why"},
    {Code::kOutOfMemory, "bytes", "{a}", "could not be allocated; use smaller batches"},
}};

std::string filled(std::string text, const Verdict& verdict) {
  const auto replace = [&text](const std::string& mark, const std::string& value) {
    for (size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at)) {
      text.replace(at, mark.size(), value);
      at += value.size();
    }
  };
  replace("{a}", to_text(verdict.a));
  replace("{b}", to_text(verdict.b));
  return text;
}

std::string dtype_text(uint8_t dtype) {
  const uint8_t number = dtype & 0x0Fu;
  if (number > static_cast<uint8_t>(kernels::kLastDType)) return to_text(int{number});
  return kernels::dtype_name(static_cast<kernels::DType>(number));
}

std::string reduce_text(uint8_t dtype) {
  switch (static_cast<ReduceOp>((dtype & ~kDeviceBit) >> 4)) {
    case ReduceOp::kSum:
      return "sum";
    case ReduceOp::kMin:
      return "min";
    case ReduceOp::kMax:
      return "max";
  }
  return to_text((dtype & ~kDeviceBit) >> 4);
}

std::string device_text(const Header& h) {
  return (h.dtype & kDeviceBit) != 0 ? "device=cuda" : "device=cpu";
}

std::string signed_text(uint32_t value, uint32_t none) {
  return value == none ? "-1" : to_text(value);
}

// "dtype=bf16, width=512": what the collective of this header carries.
std::string payload_text(const Header& h) {
  switch (static_cast<OpCode>(h.op)) {
    case OpCode::kAllReduce:
      return "dtype=" + dtype_text(h.dtype) + ", count=" + to_text(h.width) +
             ", op=" + reduce_text(h.dtype);
    case OpCode::kBroadcast:
      return "bytes=" + to_text(h.width) + ", root=" + to_text(h.rows);
    case OpCode::kAllGather:
      return "bytes=" + to_text(h.width);
    case OpCode::kExchangeCounts:
      return "counts_per_peer=" + to_text(h.width);
    default:
      return "dtype=" + dtype_text(h.dtype) + ", width=" + to_text(h.width);
  }
}

// The first thing in which two payloads differ.
std::string payload_word(const Header& x, const Header& y) {
  const auto op = static_cast<OpCode>(x.op);
  if ((x.dtype & 0x0Fu) != (y.dtype & 0x0Fu)) return "dtype";
  if (x.dtype != y.dtype) return "op";
  if (x.width == y.width) return "root";
  if (op == OpCode::kExchangeRows) return "width";
  if (op == OpCode::kExchangeCounts) return "counts_per_peer";
  return op == OpCode::kAllReduce ? "count" : "number of bytes";
}

void set_argument(ErrorDetail& detail, const std::string& text) {
  const size_t equals = text.find('=');
  detail.argument = text.substr(0, equals);
  detail.value = text.substr(equals + 1);
}

}  // namespace

std::string hex(uint32_t value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

Compared compared(Code code, const Header& odd, const Header& reference) {
  const auto same_order = "all ranks must enter the same collectives in the same order";
  const auto op_text = [](const Header& h) {
    return std::string("collective=") + op_name(static_cast<OpCode>(h.op));
  };
  switch (code) {
    case Code::kVersionDiffers:
      return {"header=" + hex(odd.version), "header=" + hex(reference.version),
              "all ranks must run the same build"};
    case Code::kSequenceDiffers:
      return {"sequence=" + to_text(odd.sequence), "sequence=" + to_text(reference.sequence),
              same_order};
    case Code::kOpDiffers:
      return {op_text(odd), op_text(reference), same_order};
    case Code::kStepDiffers:
      return {"step=" + signed_text(odd.step, ~0u), "step=" + signed_text(reference.step, ~0u),
              "all ranks must be in one step"};
    case Code::kLayerDiffers:
      return {"layer=" + signed_text(odd.layer, 0xFFFFu),
              "layer=" + signed_text(reference.layer, 0xFFFFu), "all ranks must be in one layer"};
    case Code::kPayloadDiffers:
      if (((odd.dtype ^ reference.dtype) & kDeviceBit) != 0) {
        return {device_text(odd), device_text(reference),
                "all ranks must pass memory of one kind of device"};
      }
      return {payload_text(odd), payload_text(reference),
              "all ranks must use one " + payload_word(odd, reference)};
    default:
      return {"config_hash=" + hex(odd.config_hash), "config_hash=" + hex(reference.config_hash),
              "start all ranks with the same settings and the same build"};
  }
}

void describe_difference(ErrorDetail& detail, int culprit, const Compared& texts) {
  set_argument(detail, texts.odd);
  detail.limit =
      "of rank " + to_text(culprit) + " differs from " + texts.reference + "; " + texts.rule;
}

void describe_refusal(ErrorDetail& detail, const Verdict& verdict, int size) {
  const std::string of_rank = size == 1 ? "" : "of rank " + to_text(verdict.culprit) + " ";
  for (const RefusalText& text : kRefusals) {
    if (text.code != verdict.code) continue;
    detail.argument = filled(text.argument, verdict);
    detail.value = filled(text.value, verdict);
    detail.limit = of_rank + filled(text.limit, verdict);
    return;
  }
  detail.argument = "verdict";  // a peer of a later build may know more codes
  detail.value = to_text(static_cast<int>(verdict.code));
  detail.limit = of_rank + "is a refusal that this build does not know";
}

}  // namespace perseid::comm
