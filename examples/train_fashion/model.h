#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "examples/train_fashion/train.h"
#include "moe/moe_layer.h"

namespace perseid::examples {

at::ScalarType tensor_type(kernels::DType dtype);

/// Where tokens and parameters are.
at::Device tensor_device(const TrainOptions& options);

void convert_parameters(const torch::nn::Module& module, at::ScalarType dtype);

/// To float64 what the orders of experts are trained by.
void convert_permutations(const MoELayer& layer);

/// All values of a tensor in double.
WeightDump dump_of(const std::string& name, const at::Tensor& tensor);

/// The gate of the options for tokens [T, d_model].
/// @param gate_id  number of the gate in its layer, a key of initial values
std::shared_ptr<gates::Gate> make_gate(const TrainOptions& options, int64_t d_model,
                                       int64_t gate_id = 0);

/// Eight (num_experts) linear maps 784 -> 10 behind the gate of the options. The output of the
/// layer is the mix of the experts' logits. Collective over `world`.
std::shared_ptr<MoELayer> make_model(const comm::Group& world, const TrainOptions& options);

/// What the layer reads for a batch of raw images, on the device of the options.
/// @param pixels  [n, 784] uint8
/// @param keys    [n] int64, of the hash and oracle gates: the expert is the key mod E
MoEInput model_input(const at::Tensor& pixels, const at::Tensor& keys, const TrainOptions& options);

/// Adds the orders of experts and what they are trained by, if there are any.
void add_permutations(const MoELayer& layer, std::vector<WeightDump>& dumps);

/// All parameters in global expert order. Collective: experts are collected from their ranks.
std::vector<WeightDump> collect_weights(const MoELayer& layer, int64_t num_experts);

}  // namespace perseid::examples
