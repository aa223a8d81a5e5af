#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "comm/group.h"
#include "comm/header.h"
#include "kernels/error.h"

namespace perseid::comm {

/// Why a collective does not take place; the highest code of all ranks wins. The numbers travel.
enum class Code : uint8_t {
  kGo = 0,
  // Only the receiver sees it.
  kRowsDiffer = 1,
  // Headers differ, or the names of operations.
  kConfigDiffers = 16,
  kPayloadDiffers,
  kLayerDiffers,
  kStepDiffers,
  kNameDiffers,
  kOpDiffers,
  kSequenceDiffers,
  kVersionDiffers,
  // A rank refuses its arguments.
  kSendRows = 64,
  kRecvRows,
  kPlanSize,
  kOwnRows,
  kWidth,
  kDType,
  kSendBuffer,
  kRecvBuffer,
  kOverlap,
  kDevice,
  kCountsSize,
  kCountsPerPeer,
  kCountValue,
  kCount,
  kBuffer,
  kBytes,
  kRoot,
  kColor,
  kLayer,
  kCaller,
  kOutOfMemory = 127,
  // A header did not arrive as it was sent. Only the receiver sees it.
  kDamaged = 128
};

/// What ranks agree on. `a` and `b` are the two values of the text, where the code has them.
struct Verdict {
  Code code = Code::kGo;
  int culprit = -1;
  int reporter = -1;             ///< rank that saw it
  bool is_order_broken = false;  ///< sequence, collective, layer or step differ
  int64_t a = 0;
  int64_t b = 0;
};

/// Second message of a collective: a verdict, or the operation's name if this rank sees no
/// obstacle.
Words pack(const Verdict& verdict, const char* name);
Verdict unpack_verdict(const Words& words, int sender);
std::string unpack_name(const Words& words);

/// What follows from the headers of all ranks, the same on each rank that got all of them intact. A
/// refusal wins; else the value that most ranks hold is the reference (tie: the lowest rank's) and
/// the lowest rank that differs is the culprit.
/// @param headers  [P] in rank order, own one included
Verdict judge(const std::vector<Words>& headers);

/// The verdict of the group from those of all ranks: the highest code, then the lowest culprit.
Verdict common_verdict(const std::vector<Words>& verdicts);

/// All ranks say go: compares the names of the operation.
Verdict judge_names(const std::vector<Words>& verdicts);

/// Rank, layer, step and name that an error of this call carries.
ErrorDetail detail_of(const CallSite& site, OpCode op, int rank);

/// Throws what the verdict stands for.
[[noreturn]] void throw_verdict(const Verdict& verdict, ErrorDetail detail, int size,
                                const std::vector<Words>& headers,
                                const std::vector<Words>& verdicts);

}  // namespace perseid::comm
