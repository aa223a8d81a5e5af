#include "comm/verdict.h"

#include <array>
#include <cstring>
#include <functional>

#include "comm/verdict_text.h"

namespace perseid::comm {
namespace {

constexpr size_t kNameBytes = 24;  // words 1-6

// ---- what headers are compared by --------------------------------------------------------------
using Key = std::array<uint32_t, 3>;

struct Field {
  Code code;
  bool is_order;
  Key (*key)(const Header&);
};

// In the order of the report: a swapped call also differs in what it carries.
constexpr std::array<Field, 7> kFields{{
    {Code::kVersionDiffers, false,
     [](const Header& h) {
       return Key{h.version, 0, 0};
     }},
    {Code::kSequenceDiffers, true,
     [](const Header& h) {
       return Key{h.sequence, 0, 0};
     }},
    {Code::kOpDiffers, true,
     [](const Header& h) {
       return Key{h.op, 0, 0};
     }},
    {Code::kStepDiffers, true,
     [](const Header& h) {
       return Key{h.step, 0, 0};
     }},
    {Code::kLayerDiffers, true,
     [](const Header& h) {
       return Key{h.layer, 0, 0};
     }},
    {Code::kPayloadDiffers, false,
     [](const Header& h) {
       const bool is_broadcast = h.op == static_cast<uint8_t>(OpCode::kBroadcast);
       return Key{h.dtype, h.width, is_broadcast ? h.rows : 0};
     }},
    {Code::kConfigDiffers, false,
     [](const Header& h) {
       return Key{h.config_hash, 0, 0};
     }},
}};

struct Odd {
  int culprit = -1;  // lowest rank that differs from the reference, -1: all are equal
  int reference = -1;
};

// O(P^2), but only after a difference was seen.
template <typename IsEqual>
Odd find_odd(int size, const IsEqual& is_equal) {
  Odd odd;
  int most = 0;
  for (int r = 0; r < size; ++r) {
    int holders = 0;
    for (int q = 0; q < size; ++q) holders += is_equal(r, q) ? 1 : 0;
    if (holders > most) {
      most = holders;
      odd.reference = r;
    }
  }
  for (int r = 0; r < size && odd.culprit < 0; ++r) {
    if (!is_equal(r, odd.reference)) odd.culprit = r;
  }
  return odd;
}

Odd find_odd(const std::vector<Header>& headers, const Field& field) {
  return find_odd(static_cast<int>(headers.size()), [&](int r, int q) {
    return field.key(headers[static_cast<size_t>(r)]) == field.key(headers[static_cast<size_t>(q)]);
  });
}

bool all_as_first(const std::vector<Words>& headers) {
  const Words& first = headers[0];
  const bool is_broadcast = first[3] >> 24 == static_cast<uint32_t>(OpCode::kBroadcast);
  bool is_equal = (first[0] & 0xFFu) == 0;
  for (const Words& words : headers) {
    is_equal = is_equal && words[0] == first[0] && words[1] == first[1] && words[2] == first[2] &&
               words[3] == first[3] && words[5] == first[5] && words[6] == first[6] &&
               (!is_broadcast || words[4] == first[4]);
  }
  return is_equal;
}

std::vector<Header> unpacked(const std::vector<Words>& words) {
  std::vector<Header> headers;
  headers.reserve(words.size());
  for (const Words& w : words) headers.push_back(unpack(w));
  return headers;
}

}  // namespace

// ---- messages ----------------------------------------------------------------------------------
Words pack(const Verdict& verdict, const char* name) {
  Words words{};
  if (verdict.code == Code::kGo) {
    std::memcpy(&words[1], name, strnlen(name, kNameBytes));
  } else {
    words[0] = static_cast<uint32_t>(verdict.code) << 16 |
               (65535u - static_cast<uint32_t>(verdict.culprit));
    words[1] = verdict.is_order_broken ? 1u : 0u;
    std::memcpy(&words[2], &verdict.a, sizeof(verdict.a));
    std::memcpy(&words[4], &verdict.b, sizeof(verdict.b));
  }
  seal(words);
  return words;
}

Verdict unpack_verdict(const Words& words, int sender) {
  Verdict verdict;
  if (words[0] == 0) return verdict;
  verdict.code = static_cast<Code>((words[0] >> 16) & 0xFFu);
  verdict.culprit = static_cast<int>(65535u - (words[0] & 0xFFFFu));
  verdict.reporter = sender;
  verdict.is_order_broken = words[1] != 0;
  std::memcpy(&verdict.a, &words[2], sizeof(verdict.a));
  std::memcpy(&verdict.b, &words[4], sizeof(verdict.b));
  return verdict;
}

std::string unpack_name(const Words& words) {
  std::array<char, kNameBytes + 1> name{};
  std::memcpy(name.data(), &words[1], kNameBytes);
  return name.data();
}

// ---- judging -----------------------------------------------------------------------------------
Verdict judge(const std::vector<Words>& headers) {
  Verdict verdict;
  if (all_as_first(headers)) return verdict;
  const std::vector<Header> all = unpacked(headers);
  for (const Field& field : kFields) {
    const Odd odd = find_odd(all, field);
    if (odd.culprit < 0) continue;
    verdict.is_order_broken = verdict.is_order_broken || field.is_order;
    if (verdict.code == Code::kGo) {
      verdict.code = field.code;
      verdict.culprit = odd.culprit;
    }
  }
  for (size_t r = 0; r < all.size(); ++r) {
    const bool is_higher = all[r].verdict > static_cast<uint8_t>(verdict.code);
    if (all[r].verdict == 0 || !is_higher) continue;
    verdict.code = static_cast<Code>(all[r].verdict);
    verdict.culprit = static_cast<int>(r);
  }
  return verdict;
}

Verdict common_verdict(const std::vector<Words>& verdicts) {
  Verdict common;
  uint32_t highest = 0;
  bool is_order_broken = false;
  for (size_t r = 0; r < verdicts.size(); ++r) {
    const uint32_t word = verdicts[r][0];
    if (word == 0) continue;
    const Verdict verdict = unpack_verdict(verdicts[r], static_cast<int>(r));
    is_order_broken = is_order_broken || verdict.is_order_broken;
    // Of equal words the culprit's own has the values; else that of the lowest rank.
    const bool is_better = word > highest || verdict.reporter == verdict.culprit;
    if (word >= highest && is_better) common = verdict;
    highest = word > highest ? word : highest;
  }
  common.is_order_broken = is_order_broken;
  return common;
}

Verdict judge_names(const std::vector<Words>& verdicts) {
  bool is_equal = true;
  for (const Words& words : verdicts) is_equal = is_equal && words == verdicts[0];
  Verdict verdict;
  if (is_equal) return verdict;
  const Odd odd = find_odd(static_cast<int>(verdicts.size()), [&](int r, int q) {
    return verdicts[static_cast<size_t>(r)] == verdicts[static_cast<size_t>(q)];
  });
  verdict.code = Code::kNameDiffers;
  verdict.culprit = odd.culprit;
  verdict.a = odd.reference;
  verdict.is_order_broken = true;
  return verdict;
}

// ---- throwing ----------------------------------------------------------------------------------
ErrorDetail detail_of(const CallSite& site, OpCode op, int rank) {
  ErrorDetail detail;
  detail.operation = site.operation != nullptr ? site.operation : op_name(op);
  detail.rank = rank;
  detail.layer = site.layer;
  detail.step = site.step;
  return detail;
}

void throw_verdict(const Verdict& verdict, ErrorDetail detail, int size,
                   const std::vector<Words>& headers, const std::vector<Words>& verdicts) {
  detail.culprit = verdict.culprit;
  const auto culprit = static_cast<size_t>(verdict.culprit);
  switch (verdict.code) {
    case Code::kRowsDiffer:
      detail.argument = "send_rows";
      detail.value = to_text(verdict.a);
      detail.limit = "of rank " + to_text(verdict.culprit) +
                     " differs from recv_rows=" + to_text(verdict.b) + " of rank " +
                     to_text(verdict.reporter) +
                     "; make the plans of all ranks from one exchange_counts";
      throw RanksDisagree(std::move(detail));
    case Code::kNameDiffers:
      describe_difference(detail, verdict.culprit,
                          {"operation=" + unpack_name(verdicts[culprit]),
                           "operation=" + unpack_name(verdicts[static_cast<size_t>(verdict.a)]),
                           "all ranks must enter the same collectives in the same order"});
      throw RanksDisagree(std::move(detail));
    case Code::kDamaged:
      detail.argument = "header";
      detail.value = "damaged";
      detail.limit = "from rank " + to_text(verdict.culprit) + " to rank " +
                     to_text(verdict.reporter) + ": CRC-32C " +
                     hex(static_cast<uint32_t>(verdict.a)) + " differs from " +
                     hex(static_cast<uint32_t>(verdict.b)) + "; check memory and network";
      throw DataError(std::move(detail));
    case Code::kOutOfMemory:
      describe_refusal(detail, verdict, size);
      throw OutOfMemory(std::move(detail));
    default:
      break;
  }
  if (verdict.code < Code::kSendRows) {
    const std::vector<Header> all = unpacked(headers);
    PERSEID_INVARIANT(culprit < all.size());
    for (const Field& field : kFields) {
      if (field.code != verdict.code) continue;
      const Odd odd = find_odd(all, field);
      describe_difference(
          detail, verdict.culprit,
          compared(field.code, all[culprit], all[static_cast<size_t>(odd.reference)]));
    }
    throw RanksDisagree(std::move(detail));
  }
  describe_refusal(detail, verdict, size);
  throw ConfigError(std::move(detail));
}

}  // namespace perseid::comm
