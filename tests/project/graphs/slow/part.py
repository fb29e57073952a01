PART = "whole"
